"""Images of rows: checking and decoding, and grouping of rows by image."""

import contextlib
import io
import math
import os
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from datasets import Dataset, Image, Sequence

from modeling_trips.image_decoding_trips import convert_to_rgb, open_image, orientation_of
from modeling_trips.untrusted_images import decode_untrusted
from trips_examples.data.tasks import BadRowError, Fault


# Columns with the target region of a text: a box (x0, y0, x1, y1) in pixels of the image, or None.
REGION_COLUMNS = ("region", "box")
MAX_FILE_BYTES = 1 << 29  # 50 million uncompressed pixels of 4 x 16 bits have 400 MB


def path_or_bytes(image: Any) -> Any:
    """Return the bytes, or else the path, of an image as the datasets library encodes it; other values unchanged."""
    if isinstance(image, dict) and image.keys() & {"bytes", "path"}:
        return image.get("path") if image.get("bytes") is None else image["bytes"]
    return image


def stored_image(image: str | bytes | None) -> dict[str, str | bytes | None]:
    """Return the path or the bytes of an image as the datasets library encodes it."""
    is_path = isinstance(image, str)
    return {"bytes": None if is_path else image, "path": image if is_path else None}


def check_image(image: str | bytes, patch_size: int = 1, decode: bool = True) -> tuple[int, int]:
    """
    Return the upright width and height of an image (path or encoded), after decoding it unless `decode` is off. Raise
    a `BadRowError` if it is missing, cannot be read, or has a side below `patch_size` pixels.
    """
    file = image if isinstance(image, str) else io.BytesIO(image)
    with named_errors(image), open_image(file) as opened:
        size = usable_size(opened, patch_size)
        if decode:
            opened.draft(None, (1, 1))  # JPEG: reads the whole file, but makes few pixels of it
            opened.load()
        return size


def decode_image(image: str | bytes, patch_size: int = 1) -> PIL.Image.Image:
    """Decode an image (path or encoded) to upright RGB. Errors are those of [`check_image`]."""
    file = image if isinstance(image, str) else io.BytesIO(image)
    with named_errors(image), open_image(file) as opened:
        usable_size(opened, patch_size)
        return convert_to_rgb(opened)


def decode_untrusted_image(image: str | bytes, patch_size: int = 1) -> PIL.Image.Image:
    """Decode an image from an untrusted source, within the limits of [`decode_untrusted`]."""
    with named_errors(image):
        if isinstance(image, str) and os.path.getsize(image) > MAX_FILE_BYTES:
            raise BadRowError("unreadable image", f"the file has more than {MAX_FILE_BYTES:,} bytes")
        content = Path(image).read_bytes() if isinstance(image, str) else image
        decoded = decode_untrusted(content)
        usable_size(decoded, patch_size)
        return decoded


@contextlib.contextmanager
def named_errors(image: str | bytes) -> Iterator[None]:
    """Refuse pipes and devices, which may block, and make errors inside the context a `BadRowError` with a name."""
    name = image if isinstance(image, str) else f"{len(image)} bytes"
    try:
        if isinstance(image, str) and os.path.exists(image) and not os.path.isfile(image):
            raise BadRowError("not a regular file")
        yield
    except BadRowError as error:
        raise BadRowError(error.reason, f"{name}: {error.detail}" if error.detail else name) from error
    except FileNotFoundError as error:
        raise BadRowError("missing image", os.path.abspath(name)) from error
    except Exception as error:  # broken files raise any type of error, depending on Pillow's plugin
        raise BadRowError("unreadable image", f"{name}: {error}") from error


def usable_size(image: PIL.Image.Image, patch_size: int = 1) -> tuple[int, int]:
    """Return the upright width and height of an opened image, of which only the header is read."""
    if image.mode in ("I", "F"):
        raise BadRowError(
            "image without a fixed range of grey values",
            f'mode "{image.mode}": scale it to mode "L" (0 to 255) or "I;16" (0 to 65535)',
        )
    width, height = image.size
    if orientation_of(image) >= 5:  # turned by 90 degrees
        width, height = height, width
    if min(width, height) < patch_size:
        raise BadRowError("image smaller than a patch", f"{width} x {height}, a patch is {patch_size} x {patch_size}")
    return width, height


# Images of rows


def column_of(dataset: Dataset, name: str) -> list:
    """Return a column as a list."""
    return dataset.with_format(None)[name][:]


def texts_of_column(rows: Dataset, column: str) -> list[str]:
    """Return the texts of a column of texts or of lists of texts."""
    texts: list[str] = []
    for cell in column_of(rows, column):
        texts += [cell] if isinstance(cell, str) else cell
    return texts


def without_decoding(dataset: Dataset) -> Dataset:
    """Return a data set whose images are read as encoded, for a collator that decodes each once."""
    encoded = Image(decode=False)
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, encoded)
        elif isinstance(getattr(feature, "feature", None), Image):
            dataset = dataset.cast_column(column, Sequence(encoded))
    return dataset


def regions_of(rows: Dataset) -> list:
    """Return the target region of each row, a box or None, or nothing if the rows have no column of regions."""
    column = next((column for column in REGION_COLUMNS if column in rows.column_names), None)
    return [] if column is None else column_of(rows, column)


def read_image(row: dict, patch_size: int = 1) -> PIL.Image.Image:
    """Return the image of a row, RGB and upright. The message of a `ValueError` names the row."""
    if isinstance(row["image"], PIL.Image.Image):  # streams decode images, to skip broken ones
        return row["image"]
    try:
        return decode_image(path_or_bytes(row["image"]), patch_size)
    except BadRowError as error:
        raise ValueError(f"{Fault(row['source'], error.reason, error.detail)}.") from error


def image_size(row: dict) -> tuple[int, int]:
    """Return the upright (height, width) in pixels of a row's encoded image."""
    return check_image(path_or_bytes(row["image"]), decode=False)[::-1]


@dataclass
class DecodedImages(torch.utils.data.Dataset):
    """Images of rows, decoded on access."""

    rows: Dataset | list
    decode: Callable[[Any], PIL.Image.Image] = read_image

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> PIL.Image.Image:
        return self.decode(self.rows[row])


def first_rows(image_ids: Collection[Hashable]) -> tuple[list[int], list[int]]:
    """Return the first row of each image, and the index of each row's image among them."""
    rows: dict[Hashable, int] = {}
    for row, image_id in enumerate(image_ids):
        rows.setdefault(image_id, row)
    position = {image_id: index for index, image_id in enumerate(rows)}
    return list(rows.values()), [position[image_id] for image_id in image_ids]


def one_row_per_image(dataset: Dataset) -> tuple[Dataset, list[list[str]]]:
    """Return the first row of each image, and all captions of each image."""
    rows, image_of_row = first_rows(column_of(dataset, "image_id"))
    captions = [[] for _ in rows]
    for image, caption in zip(image_of_row, column_of(dataset, "caption")):
        captions[image].append(caption)
    return dataset.select(rows), captions


def image_keys(rows: Dataset) -> list[Hashable]:
    """Return the image or the images of each row: rows with the same key share a computation."""
    if "image_id" in rows.column_names:
        return column_of(rows, "image_id")
    return [tuple(ids) for ids in column_of(rows, "image_ids")]


def some_image_sizes(rows: Dataset) -> list[tuple[int, int]]:
    """Return the upright (height, width) in pixels of the images of up to 256 rows, of pairs the first."""
    step = math.ceil(len(rows) / 256)
    sizes = []
    for row in rows.select(range(0, len(rows), step)):
        image = row["images"][0] if "images" in row else row["image"]
        sizes.append(image_size({"image": image}))
    return sizes
