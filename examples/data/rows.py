"""Access to the images of rows, and grouping of rows by image."""

import PIL.Image
import torch
from datasets import Dataset, Image, Sequence

from trips_examples.data.faults import BadRowError, BadRows, Fault
from trips_examples.data.images import decode_image, open_image, path_or_bytes, upright_size, usable_size


def column_of(dataset: Dataset, name: str) -> list:
    """Return a column without running transforms, which compose scenes."""
    return dataset.with_format(None)[name][:]


def without_decoding(dataset: Dataset) -> Dataset:
    """Return the data set with encoded images, which a collator decodes once for all rows of an image."""
    encoded = Image(decode=False)
    for column, feature in (("image", encoded), ("images", Sequence(encoded))):
        if column in dataset.column_names:
            dataset = dataset.cast_column(column, feature)
    return dataset


def without_faults(dataset: Dataset, faults: dict[int, Fault], split: str, skip: bool) -> Dataset:
    """
    Return the rows of a split without faults.

    Args:
        dataset (`Dataset`)
        faults (`dict[int, Fault]`): faults by row index.
        split (`str`): name of the split.
        skip (`bool`): whether to skip rows with a warning that counts them, instead of raising an error.

    Raises:
        `ValueError`: There are faults and `skip` is off. The message names the first few.
    """
    BadRows(skip).settle(list(faults.values()), split, len(dataset))
    return dataset.select([row for row in range(len(dataset)) if row not in faults]) if faults else dataset


def read_image(row: dict, patch_size: int = 1) -> PIL.Image.Image:
    """
    Return the image of a row, RGB and upright.

    Args:
        row (`dict`): With `source` and `image`, which is encoded, or decoded in rows of a stream.
        patch_size (`int`, *optional*, defaults to 1): Smallest accepted side in pixels.

    Raises:
        `ValueError`: The image cannot be used. The message names the row.
    """
    image = row["image"]
    try:
        if isinstance(image, PIL.Image.Image):  # streams decode images, to skip broken ones
            usable_size(image, patch_size)
            return image
        return decode_image(path_or_bytes(image), patch_size)
    except BadRowError as error:
        raise ValueError(f"{Fault(row['source'], error.reason, error.detail)}.") from error


def image_size(row: dict) -> tuple[int, int]:
    """Return the upright (height, width) in pixels of a row's image, which is encoded or a composed scene."""
    if isinstance(row["image"], PIL.Image.Image):
        return row["image"].size[::-1]
    with open_image(path_or_bytes(row["image"])) as image:
        return upright_size(image)[::-1]


class DecodedImages(torch.utils.data.Dataset):
    """Images of rows, decoded on access."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> PIL.Image.Image:
        return read_image(self.rows[row])


def first_rows(image_ids: list[str]) -> tuple[list[int], list[int]]:
    """Return the first row of each image, and the index of each row's image among them."""
    rows: dict[str, int] = {}
    for row, image_id in enumerate(image_ids):
        rows.setdefault(image_id, row)
    position = {image_id: index for index, image_id in enumerate(rows)}
    return list(rows.values()), [position[image_id] for image_id in image_ids]


def images_of(dataset: Dataset) -> tuple[list[int], torch.LongTensor]:
    """Return the `first_rows` of a data set."""
    rows, image_of_row = first_rows(column_of(dataset, "image_id"))
    return rows, torch.tensor(image_of_row)


def image_sizes(dataset: Dataset) -> dict[str, tuple[int, int]]:
    """Return the upright (height, width) in pixels of each image by `image_id`."""
    rows, _ = images_of(dataset)
    return {row["image_id"]: image_size(row) for row in dataset.select(rows)}


def one_row_per_image(dataset: Dataset) -> tuple[Dataset, list[list[str]]]:
    """Return the first row of each image, and all captions of each image."""
    rows, image_of_row = images_of(dataset)
    captions = [[] for _ in rows]
    for image, caption in zip(image_of_row.tolist(), column_of(dataset, "caption")):
        captions[image].append(caption)
    return dataset.select(rows), captions
