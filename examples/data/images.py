"""Images of records: finding, checking and decoding files, encoded images and images in tables."""

import contextlib
import functools
import io
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import PIL.Image
import pyarrow.parquet
from datasets import Dataset, Features, Image

from modeling_trips.image_decoding_trips import check_format, convert_to_rgb, orientation_of
from modeling_trips.untrusted_images import decode_untrusted
from trips_examples.data.faults import BadRowError
from trips_examples.data.tasks import Task, filled_text, is_missing, list_of, missing


JPEG_END, JPEG_SCAN = b"\xff\xd9", b"\xff\xda"
MAX_FILE_BYTES = 1 << 29  # 50 million uncompressed pixels of 4 x 16 bits have 400 MB


class Found(NamedTuple):
    """An image as `datasets.Image` takes it, with its path and (width, height), if known."""

    image: Any
    path: str | None
    size: tuple[int, int] | None


def _image_values(record: dict, task: Task) -> list:
    """Return the images of a record. Raise a `BadRowError` if one is missing."""
    if task.image_column == "images" and not is_missing(record.get("images")):
        values = list_of(record["images"], "images")
        if len(values) != 2:
            raise BadRowError("not two images", reprlib.repr(values))
        if any(map(is_missing, values)):
            raise BadRowError("no image", f"images is {reprlib.repr(values)}")
        return values
    columns = ["image"] if task.image_column == "image" else ["left_image", "right_image"]
    for column in columns:
        if is_missing(record.get(column)):
            raise missing(column, record)
    return [record[column] for column in columns]


class ImageFinder:
    """
    Finder of the images of a record: files in a folder, each checked once, or encoded images.

    Args:
        task (`Task`)
        root (`Path`): Folder that paths are relative to.
        check (`str`, *optional*), patch_size (`int`): see `inspect_image`.
    """

    def __init__(self, task: Task, root: Path, check: str | None, patch_size: int):
        self.task, self.root = task, root
        self.inspect = functools.partial(inspect_image, check=check, patch_size=patch_size)
        self.inspect_once = functools.cache(self.inspect)  # images occur in several rows

    def __call__(self, record: dict) -> list[Found]:
        return [self.find(value) for value in _image_values(record, self.task)]

    def find(self, value: Any) -> Found:
        value = path_or_bytes(value)
        if isinstance(value, bytes):
            return Found({"bytes": value, "path": None}, None, _size(self.inspect(value)))
        values = value if isinstance(value, tuple) else (value,)  # possible paths, the likeliest first
        places = [str(self.root / filled_text({"image": value}, "image")) for value in values]
        path = next(filter(os.path.isfile, places), places[0])
        return Found(path, path, _size(self.inspect_once(path)))


def path_or_bytes(image: Any) -> Any:
    """Return the bytes, or else the path, of an image as the datasets library encodes it; other values unchanged."""
    if isinstance(image, dict) and image.keys() & {"bytes", "path"}:
        return image.get("path") if image.get("bytes") is None else image["bytes"]
    return image


def inspect_image(image: str | bytes, check: str | None, patch_size: int = 1) -> tuple[int, int] | BadRowError | None:
    """
    Return the upright width and height of an image (path or encoded), or its error. `check="header"` reads the size,
    `"verify"` looks for damage without decoding, `"decode"` decodes, and None does nothing.
    """
    if check is None:
        return None
    try:
        if check == "decode":
            return decode_image(image, patch_size).size
        with open_image(image) as opened:
            size = usable_size(opened, patch_size)
            if check == "verify":
                _verify(opened, image)
        return size
    except BadRowError as error:
        return error


def decode_image(image: str | bytes, patch_size: int = 1) -> PIL.Image.Image:
    """
    Decode an image (path or encoded) to upright RGB.

    Raises:
        `BadRowError`: The image is missing, cannot be read, or has a side below `patch_size` pixels.
    """
    with open_image(image) as opened:
        usable_size(opened, patch_size)
        return convert_to_rgb(opened)


def decode_untrusted_image(image: str | bytes, patch_size: int = 1) -> PIL.Image.Image:
    """
    Decode an image from an untrusted source, within the limits of
    [`modeling_trips.untrusted_images.decode_untrusted`]. [`decode_image`] accepts every format that Pillow decodes.
    """
    try:
        decoded = decode_untrusted(_content_of(image))
        usable_size(decoded, patch_size)
    except (OSError, ValueError) as error:
        raise _named(error, image) from error
    return decoded


def _content_of(image: str | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    _check_is_file(image)
    if os.path.getsize(image) > MAX_FILE_BYTES:
        raise BadRowError("unreadable image", f"the file has more than {MAX_FILE_BYTES:,} bytes")
    return Path(image).read_bytes()


@contextlib.contextmanager
def open_image(image: str | bytes) -> Iterator[PIL.Image.Image]:
    """Open an image. Errors inside the context become a `BadRowError` that names it."""
    try:
        if isinstance(image, str):
            _check_is_file(image)
        with PIL.Image.open(image if isinstance(image, str) else io.BytesIO(image)) as opened:
            yield opened
    # Broken files raise any type of error, depending on Pillow's plugin.
    except Exception as error:
        raise _named(error, image) from error


def _check_is_file(path: str):
    """Refuse pipes and devices, which may block."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadRowError("not a regular file")


def _named(error: Exception, image: str | bytes) -> BadRowError:
    """Return the error of an image as a `BadRowError` that names it."""
    name = image if isinstance(image, str) else f"{len(image)} bytes"
    if isinstance(error, BadRowError):
        return BadRowError(error.reason, f"{name}: {error.detail}" if error.detail else name)
    if isinstance(error, FileNotFoundError):
        return BadRowError("missing image", name)
    return BadRowError("unreadable image", f"{name}: {error}")


def usable_size(image: PIL.Image.Image, patch_size: int = 1) -> tuple[int, int]:
    """
    Return the upright width and height of an opened image. Only the header is read.

    Raises:
        `BadRowError`: The mode or the size cannot be used.
        `ValueError`: The format is not supported.
    """
    check_format(image)
    if image.mode in ("I", "F"):
        raise BadRowError(
            "image without a fixed range of grey values",
            f'mode "{image.mode}": scale it to mode "L" (0 to 255) or "I;16" (0 to 65535)',
        )
    width, height = size = upright_size(image)
    if min(size) < patch_size:
        raise BadRowError("image smaller than a patch", f"{width} x {height}, a patch is {patch_size} x {patch_size}")
    return size


def upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    """Return the upright width and height of an opened image."""
    return image.size[::-1] if orientation_of(image) >= 5 else image.size


def _verify(opened: PIL.Image.Image, image: str | bytes):
    """Look for damage without decoding, and close the image."""
    if opened.format == "JPEG":
        with open(image, "rb") if isinstance(image, str) else io.BytesIO(image) as content:
            if not _is_whole_jpeg(content):
                raise BadRowError("unreadable image", "image file is truncated")
    opened.verify()


def _is_whole_jpeg(content: BinaryIO) -> bool:
    """Return whether an end marker follows the start of the scan. Thumbnails before it have their own markers."""
    content.seek(-2, io.SEEK_END)
    if content.read() == JPEG_END:
        return True
    content.seek(2)  # after the start marker
    while (marker := content.read(2))[:1] == b"\xff" and marker != JPEG_SCAN:
        content.seek(int.from_bytes(content.read(2), "big") - 2, io.SEEK_CUR)
    return JPEG_END in content.read()


def _size(inspected: tuple[int, int] | BadRowError | None) -> tuple[int, int] | None:
    if isinstance(inspected, BadRowError):
        raise BadRowError(inspected.reason, inspected.detail)
    return inspected


# Tables that hold their images: the Hub, and Parquet with encoded images


def has_encoded_images(file: Path, task: Task) -> bool:
    if file.suffix.lower() != ".parquet" or not file.is_file():
        return False
    try:
        schema = pyarrow.parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError):
        return False  # reading the records reports the error
    columns = [task.image_column] if task.image_column in schema.names else ["left_image"]
    types = [schema.field(column).type for column in columns if column in schema.names]
    types = [getattr(type, "value_type", type) for type in types]  # element types of lists
    is_encoded = (pyarrow.types.is_struct, pyarrow.types.is_binary, pyarrow.types.is_large_binary)
    return any(matches(type) for type in types for matches in is_encoded)


def images_of_table(table: Dataset, task: Task, name: str) -> Dataset:
    """Return the image column of a table, as in the task's schema."""
    column, pair = task.image_column, ["left_image", "right_image"]
    has_pair = column == "images" and column not in table.column_names and {*pair} <= {*table.column_names}
    has_texts = task.text == "caption" and "captions" in table.column_names
    needed = (set() if has_texts else {task.text}) | (set() if has_pair else {column})
    if absent := needed - {*table.column_names}:
        raise ValueError(f"{name} has no columns {sorted(absent)}, only {table.column_names}. Rename them.")
    if not has_pair:
        return table.select_columns(column).cast_column(column, task.features[column])
    sides = table.select_columns(pair)
    for side in pair:
        sides = sides.cast_column(side, Image(decode=False))
    return sides.map(
        lambda row: {column: [row[side] for side in pair]},
        remove_columns=pair,
        features=Features({column: task.features[column]}),
        desc=f"Pairing the images of {name}",
    )
