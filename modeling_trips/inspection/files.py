# Copyright 2026 The TRIPS for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Writing of files and folders, which are whole or absent under their name."""

import glob
import os
import shutil
import signal
import tempfile
import threading
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
    Yield a path that is renamed to `folder`, which must be new or empty, if the block neither fails nor receives
    SIGTERM. What a killed process left beside `folder` is removed.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-writing-"
    for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(Timeout), FileLock(left / "lock", timeout=0):  # its writer is dead
            shutil.rmtree(left)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    try:
        with _sigterm_as_exit(), FileLock(partial / "lock"):
            yield partial / "whole"
            (partial / "whole").rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Raise SystemExit on SIGTERM, so that `finally` blocks run. Only the main thread can set this up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
