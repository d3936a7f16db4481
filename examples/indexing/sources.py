"""The images of a collection as rows. The source of an image identifies it."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from trips_examples.data.faults import BadRowError, Fault, printable
from trips_examples.data.shards import IMAGE_SUFFIXES, FileShard, HubShard, TarShard, find_shards
from trips_examples.data.streams import IMAGE_COLUMNS, encoded_image


FILES_PER_SHARD = 256
ROWS_PER_BLOCK = 32

# `image` as the datasets library encodes it.
ROW_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "error": pa.string(),
    }
)


@dataclass(frozen=True)
class FolderShard:
    """Some image files of folders."""

    paths: tuple[str, ...]

    def __iter__(self) -> Iterator[dict]:
        for path in self.paths:
            yield {"source": path, "image": path}


Shard = FolderShard | TarShard | FileShard | HubShard


def find_images(places: Sequence[str], image_root: str | None = None) -> list[Shard]:
    """
    Return the shards of a collection, each once, with absolute paths.

    Args:
        places (`Sequence[str]`): folders, which are searched recursively for image files; or shards and files of rows,
            as in `find_shards`.
        image_root (`str`, *optional*): Folder that paths in files of rows are relative to. Default: the file's folder.

    Raises:
        FileNotFoundError: A place or `image_root` does not exist, or a folder has no images.
        ValueError: `image_root` is given without a file of rows.
    """
    if image_root is not None and not os.path.isdir(image_root):
        raise FileNotFoundError(f"The folder {image_root} does not exist. Correct --image_root.")
    files: dict[str, None] = {}
    shards: dict[Shard, None] = {}
    for place in places:
        if os.path.isdir(place):
            files |= dict.fromkeys(_image_files(place))
        else:
            shards |= dict.fromkeys(map(_absolute, find_shards([place], image_root, option="--images")))
    if image_root is not None and not any(isinstance(shard, FileShard) for shard in shards):
        raise ValueError("--image_root is only supported for --images that are JSONL, JSON, CSV or Parquet files.")
    paths = iter(files)
    chunks = iter(lambda: tuple(islice(paths, FILES_PER_SHARD)), ())
    return [*map(FolderShard, chunks), *shards]


def _image_files(folder: str) -> list[str]:
    paths = (os.path.join(root, name) for root, _, names in os.walk(os.path.abspath(folder)) for name in names)
    found = sorted(path for path in paths if path.lower().endswith(tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)))
    if not found:
        raise FileNotFoundError(
            f"--images {folder} has no file that ends with .{', .'.join(IMAGE_SUFFIXES)}. "
            f'For shards, give the files: "{folder}/*.tar" or "{folder}/*.parquet".'
        )
    return found


def _absolute(shard: TarShard | FileShard) -> TarShard | FileShard:
    if isinstance(shard, FileShard):
        return FileShard(os.path.abspath(shard.name), os.path.abspath(shard.image_root))
    is_local = os.path.isfile(shard.name)
    return replace(shard, name=os.path.abspath(shard.name)) if is_local else shard


def id_of(source: str) -> str:
    """Return a hash of a source, 32 hexadecimal digits."""
    return hashlib.blake2b(source.encode(), digest_size=16).hexdigest()


def rows_of(shard: Shard, image_column: str | None = None) -> Iterator[dict]:
    """
    Yield the images of a shard as rows of `ROW_SCHEMA`: `image` is encoded or a path, or `error` is set. A file that
    several rows name is yielded once.

    Args:
        shard (`Shard`)
        image_column (`str`, *optional*): by default the first of `IMAGE_COLUMNS` that a record has.
    """
    columns = IMAGE_COLUMNS if image_column is None else (image_column,)
    seen: Counter[str] = Counter()
    paths: set[str | bytes] = set()
    for record in shard:
        source, image, error = printable(_source(shard, record)), None, None
        if isinstance(shard, TarShard):  # a tar file may have equal names and several broken places
            seen[source] += 1
            source += f" ({seen[source]})" if seen[source] > 1 else ""
        if isinstance(record, Fault):
            error = record.error
        else:
            try:
                image = _image(record, columns)
            except BadRowError as bad:
                error = str(bad)
        if image is not None and image["path"] is not None:
            if image["path"] in paths:
                continue
            paths.add(image["path"])
        yield {"id": id_of(source), "source": source, "image": image, "error": error}


def _source(shard: Shard, record: dict | Fault) -> str:
    source = record.source if isinstance(record, Fault) else record["source"]
    # Records have only the name of their file.
    return os.path.join(os.path.dirname(shard.name), source) if isinstance(shard, FileShard) else source


def _image(record: dict, columns: Sequence[str]) -> dict[str, bytes | str | None]:
    encoded = encoded_image(record, columns)
    if isinstance(encoded, bytes):
        return {"bytes": encoded, "path": None}
    return {"bytes": None, "path": str(Path(record.get("image_root", "")) / encoded)}


def blocks_of(shard: Shard, done: np.ndarray, image_column: str | None = None) -> Iterator[pa.Table]:
    """
    Yield blocks of the rows of a shard that are not in the table.

    Args:
        shard (`Shard`)
        done (`np.ndarray` of shape `(num_rows,)` and type `S32`): sorted ids of the table.
        image_column (`str`, *optional*)
    """
    rows = (row for row in rows_of(shard, image_column) if not _contains(done, row["id"]))
    for block in iter(lambda: list(islice(rows, ROWS_PER_BLOCK)), []):
        yield pa.Table.from_pylist(block, schema=ROW_SCHEMA)


def _contains(done: np.ndarray, id: str) -> bool:
    place = np.searchsorted(done, id.encode())
    return bool(place < len(done) and done[place] == id.encode())
