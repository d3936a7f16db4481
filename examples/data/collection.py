"""The images of a collection as rows. The source of an image identifies it."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features
from datasets.fingerprint import Hasher
from huggingface_hub.utils import chunk_iterable

from modeling_trips import __version__
from modeling_trips.inspection.checkpoints import local_folder
from trips_examples.data.loading import stamp_of
from trips_examples.data.printing import printable
from trips_examples.data.streams import IMAGE_SUFFIXES, FileShard, TarShard, encoded_image, find_shards
from trips_examples.data.tasks import SHOWN, BadRowError, Fault


logger = logging.getLogger(__name__)

FILES_PER_SHARD = 256
SUFFIXES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)


@dataclass(frozen=True)
class FolderShard:
    """Some image files of folders."""

    paths: tuple[str, ...]

    def __iter__(self) -> Iterator[dict]:
        for path in self.paths:
            yield {"source": path, "image": path}


Shard = FolderShard | TarShard | FileShard


def find_images(places: Sequence[str], image_root: str | None = None) -> list[Shard]:
    """
    Return the shards of a collection, each once, with absolute paths. Places are image files, folders, which are
    searched recursively for them, or shards and files of rows, as in `find_shards`. A `FileNotFoundError` names a
    place or `image_root` that does not exist, and a folder without images.
    """
    if image_root is not None and not os.path.isdir(image_root):
        raise FileNotFoundError(f"The folder {image_root} does not exist. Correct --image_root.")
    root = None if image_root is None else os.path.abspath(image_root)
    files: dict[str, None] = {}
    shards: dict[Shard, None] = {}
    for place in places:
        path = place if "://" in place or place.startswith("pipe:") else os.path.abspath(place)
        if os.path.isdir(path):
            files |= dict.fromkeys(_image_files(path))
        else:
            for shard in find_shards([path], root, option="--images"):
                if shard.name.lower().endswith(SUFFIXES):
                    files[shard.name] = None
                else:
                    shards[shard] = None
    return [*(FolderShard(tuple(paths)) for paths in chunk_iterable(files, FILES_PER_SHARD)), *shards]


def _image_files(folder: str) -> list[str]:
    """Return the image files of a folder by their suffixes, and name others in a warning."""
    found = []
    others = []
    for root, _, names in os.walk(folder):
        for name in names:
            (found if name.lower().endswith(SUFFIXES) else others).append(os.path.join(root, name))
    found.sort()
    if not found:
        raise FileNotFoundError(
            f"--images {folder} has no file that ends with .{', .'.join(IMAGE_SUFFIXES)}. "
            f'For shards, give the files: "{folder}/*.tar" or "{folder}/*.parquet".'
        )
    if others:
        named = ", ".join(os.path.relpath(path, folder) for path in sorted(others)[:SHOWN])
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        logger.warning(f"{folder}: left out {len(others)} files that have no suffix of an image: {named}{more}.")
    return found


def rows_of(shard: Shard, image_column: str | None = None) -> Iterator[dict]:
    """
    Yield the images of a shard as rows: `image` as the datasets library encodes it, or its `error`. A file that
    several rows name is yielded once. `image_column` is by default the first of `IMAGE_COLUMNS` that a record has.
    """
    sources: Counter[str] = Counter()
    paths: set[str] = set()
    for record in shard:
        source = record.source if isinstance(record, Fault) else record["source"]
        if isinstance(shard, FileShard):  # its records have only the name of their file
            source = os.path.join(os.path.dirname(shard.name), source)
        source = printable(source)
        image = None
        error = None
        sources[source] += 1
        if sources[source] > 1:  # a tar file may have equal names and several broken places
            source += f" ({sources[source]})"
        if isinstance(record, Fault):
            error = record.error
        else:
            try:
                content = encoded_image(record, image_column)
                if isinstance(content, str):
                    content = str(Path(record.get("image_root", ""), content))
                    if content in paths:
                        continue
                    paths.add(content)
                is_path = isinstance(content, str)
                image = {"bytes": None if is_path else content, "path": content if is_path else None}
            except BadRowError as bad:
                error = str(bad)
        yield {"source": source, "image": image, "error": error}


def version_of_model(model: str) -> list[str]:
    """Return the stamps of the files of a model."""
    return [stamp_of(path) for path in sorted(local_folder(model).iterdir())]


def kept_rows(make_rows: Callable[..., Iterator[dict]], features: Features, version: tuple, **given) -> Dataset:
    """Return the rows that `make_rows(**given)` yields, or those of an earlier call with what has this version."""
    fingerprint = Hasher.hash((__version__, version))
    return Dataset.from_generator(make_rows, features=features, gen_kwargs=given, fingerprint=fingerprint)
