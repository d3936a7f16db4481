"""Where the images of records are, and whether they can be read: files, encoded images, tables that hold them."""

import functools
import io
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

import PIL.ExifTags
import PIL.Image
import pyarrow.parquet
from datasets import Dataset, Features, Image, Sequence

from trips_examples.data.formats import BadRowError
from trips_examples.data.tasks import Task, filled_text, list_of


class Found(NamedTuple):
    """An image as `datasets.Image` takes it; its path and (width, height) where they are known."""

    image: Any
    path: str | None
    size: tuple[int, int] | None


def _image_values(record: dict, task: Task) -> list:
    if task.image_column == "image":
        return [record.get("image")]
    if record.get("images"):
        values = list_of(record["images"], "images")
    else:
        values = [record.get("left_image"), record.get("right_image")]
    if len(values) != 2:
        raise BadRowError("not two images", reprlib.repr(values))
    return values


class ImageFinder:
    """
    Finds the images of a record: files in a folder, each checked once, or encoded ones as they are.

    Args:
        task (`Task`)
        root (`Path`): Folder that paths are relative to.
        check (`str`, *optional*): How to check them, see `inspect_image`.
    """

    def __init__(self, task: Task, root: Path, check: str | None):
        if not root.is_dir():
            raise FileNotFoundError(f"There is no folder {root}: image_root is the one the images are in.")
        self.task, self.root, self.check = task, root, check
        # Texts share images.
        self.inspect_once = functools.cache(functools.partial(inspect_image, check=check))

    def __call__(self, number: int, record: dict) -> list[Found]:
        return [self.find(value) for value in _image_values(record, self.task)]

    def find(self, value: Any) -> Found:
        if isinstance(value, dict) and value.get("bytes") is not None:
            return Found(value, None, _size(inspect_image(value["bytes"], self.check)))
        if isinstance(value, tuple):  # of places, the likeliest first
            value = next((path for path in value if (self.root / path).is_file()), value[0])
        path = str(self.root / filled_text({"image": value}, "image"))
        return Found(path, path, _size(self.inspect_once(path)))


def inspect_image(image: str | bytes, check: str | None) -> tuple[int, int] | BadRowError | None:
    """
    The width and height of an image, upright, by its path or encoded, or what is wrong with it. By `check`,
    `"header"` reads no more than these, `"verify"` looks for damage without decoding it, `"decode"` finds truncated
    images too, and None looks at nothing.
    """
    if check is None:
        return None
    name = image if isinstance(image, str) else f"{len(image)} bytes"
    try:
        with PIL.Image.open(image if isinstance(image, str) else io.BytesIO(image)) as opened:
            size = upright_size(opened)
            {"header": lambda: None, "verify": opened.verify, "decode": opened.load}[check]()
    except FileNotFoundError:
        return BadRowError("missing image", name)
    # What else a broken file raises is up to the Pillow plugin of its format.
    except Exception as error:
        return BadRowError("unreadable image", f"{name}: {error}")
    return size


def upright_size(image: PIL.Image.Image) -> tuple[int, int]:
    """Width and height of an opened image as its EXIF data turn it. Reads the header only."""
    exif = PIL.Image.Image.getexif(image)  # that of PNG would decode the image, to find what stands at its end
    return image.size[::-1] if exif.get(PIL.ExifTags.Base.Orientation, 1) >= 5 else image.size


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
    except pyarrow.ArrowInvalid:
        return False  # reading the records says so
    columns = [task.image_column] if task.image_column in schema.names else ["left_image"]
    types = [schema.field(column).type for column in columns if column in schema.names]
    types = [getattr(type, "value_type", type) for type in types]  # of lists, what they hold
    return any(map(pyarrow.types.is_struct, types))


def images_of_table(table: Dataset, task: Task, name: str) -> Dataset:
    """The column of the images alone, as the schema has it."""
    column, pair = task.image_column, ["left_image", "right_image"]
    has_pair = column == "images" and column not in table.column_names and {*pair} <= {*table.column_names}
    if missing := ({task.text} if has_pair else {column, task.text}) - {*table.column_names}:
        raise ValueError(f"{name} has no columns {sorted(missing)}, only {table.column_names}: rename them.")
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


class TableImageFinder:
    """
    Checks the images of a record, whose place in the table is its number, and leaves them there.

    Args:
        images (`Dataset`): See `images_of_table`.
        task (`Task`)
        check (`str`, *optional*): How to check them, see `inspect_image`.
    """

    def __init__(self, images: Dataset, task: Task, check: str | None):
        self.column, self.check = task.image_column, check
        encoded = Image(decode=False)
        self.images = images.cast_column(self.column, encoded if self.column == "image" else Sequence(encoded))

    def __call__(self, number: int, record: dict) -> list[Found]:
        if self.check is None:
            return [Found(None, None, None)] * (1 if self.column == "image" else 2)
        value = self.images[number - 1][self.column]
        images = value if isinstance(value, list) else [value]
        if len(images) != (1 if self.column == "image" else 2):
            raise BadRowError("not two images", f"{len(images)} of them")
        encoded = [image and (image["path"] if image["bytes"] is None else image["bytes"]) for image in images]
        if None in encoded:
            raise BadRowError("no image")
        return [Found(None, None, _size(inspect_image(image, self.check))) for image in encoded]
