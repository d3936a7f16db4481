"""Writing of files and folders, which are whole or absent under their name."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path with the suffix of `path`. It replaces `path` if the block does not fail."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """
    Yield a path that is renamed to `folder`, which must be new or empty, if the block does not fail. What killed
    processes left of this folder is removed.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-writing-"
    for lock_file in folder.parent.glob(f"{glob.escape(prefix)}*/lock"):
        with suppress(Timeout), FileLock(lock_file, blocking=False):  # its process does not live
            shutil.rmtree(lock_file.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as partial:
        with FileLock(Path(partial) / "lock"):
            yield Path(partial) / "whole"
            (Path(partial) / "whole").rename(folder)
