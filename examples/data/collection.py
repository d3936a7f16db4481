"""The images of a collection as rows. The source of an image identifies it."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features
from datasets.fingerprint import Hasher
from huggingface_hub.utils import chunk_iterable

from modeling_trips import TripsProcessor, __version__
from modeling_trips.inspection.checkpoints import local_folder
from trips_examples.data.images import decode_untrusted_image
from trips_examples.data.loading import RowReader, stamp_of
from trips_examples.data.printing import printable
from trips_examples.data.streams import IMAGE_SUFFIXES, FileShard, TarShard, encoded_image, find_shards
from trips_examples.data.tasks import SHOWN, TASKS, BadRowError, Fault


logger = logging.getLogger(__name__)

FILES_PER_SHARD = 256
PAIRS = RowReader(TASKS["nlvr2"], name="", image_root="")
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


def rows_of(shard: Shard, image_column: str | None = None, num_images: int = 1) -> Iterator[dict]:
    """
    Yield the images of a shard, or with `num_images=2` the pairs of a file of rows, each once, as rows: `images`,
    paths or encoded; `source`, their paths, or the place of encoded ones; `error`, of those that cannot be used.
    `image_column` is by default the first of `IMAGE_COLUMNS` that a record has.
    """
    places: Counter[str] = Counter()
    sources: set[str] = set()
    for record in shard:
        place = record.source if isinstance(record, Fault) else record["source"]
        if isinstance(shard, FileShard):  # its records have only the name of their file
            place = os.path.join(os.path.dirname(shard.name), place)
        place = printable(place)
        places[place] += 1
        if places[place] > 1:  # a tar file may have equal names and several broken places
            place += f" ({places[place]})"
        images = []
        error = None
        try:
            if isinstance(record, Fault):
                raise BadRowError(record.reason, record.detail)
            columns = [image_column]
            if num_images == 2:
                columns = ["left_image", "right_image"]
                record |= dict(zip(columns, PAIRS.image_values(record)))
            for column in columns:
                image = encoded_image(record, column)
                if isinstance(image, str):
                    image = str(Path(record.get("image_root", ""), image))
                images.append(image)
        except BadRowError as bad:
            images = []
            error = str(bad)
        names = [image if isinstance(image, str) else place for image in images]
        source = "|".join(names) or place
        if source not in sources:
            yield {"source": source, "images": images, "error": error}
        sources.add(source)


def results_of(
    rows: Iterable[dict], compute: Callable[[torch.Tensor, list], list], processor: TripsProcessor, batch_size: int
) -> Iterator[tuple[dict, Any]]:
    """
    Yield rows of [`rows_of`], each with its result. `compute` returns the results of up to `batch_size` rows from
    their `pixel_values` (num_images, 3, image_size, image_size) and the (height, width) of the last image of each.
    A row whose images cannot be decoded gets an `error`, and the result None.
    """
    for batch in map(list, chunk_iterable(rows, batch_size)):
        pixel_values = {}
        sizes = []
        for place, row in enumerate(batch):
            if row["error"] is not None:
                continue
            try:
                pixels = []
                for image in row["images"]:  # one photo at a time: decoded, it may take hundreds of megabytes
                    decoded = decode_untrusted_image(image, processor.patch_size)
                    pixels.append(processor(images=decoded, return_tensors="pt")["pixel_values"])
            except BadRowError as error:
                row["error"] = str(error)
                continue
            pixel_values[place] = torch.cat(pixels)
            sizes.append((decoded.height, decoded.width))
        results = {}
        if pixel_values:
            computed = compute(torch.cat([*pixel_values.values()]), sizes)
            results = dict(zip(pixel_values, computed, strict=True))
        for place, row in enumerate(batch):
            yield row, results.get(place)


def version_of_model(model: str) -> list[str]:
    """Return the stamps of the files of a model."""
    return [stamp_of(path) for path in sorted(local_folder(model).iterdir())]


def kept_rows(make_rows: Callable[..., Iterator[dict]], features: Features, version: tuple, **given) -> Dataset:
    """Return the rows that `make_rows(**given)` yields, or those of an earlier call with what has this version."""
    fingerprint = Hasher.hash((__version__, version))
    return Dataset.from_generator(make_rows, features=features, gen_kwargs=given, fingerprint=fingerprint)
