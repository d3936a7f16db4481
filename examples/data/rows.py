"""Rows before they are batches: their images read, those about one image found, texts that are too long left out."""

import io
import logging

import PIL.Image
import torch
from datasets import Dataset, DatasetDict, Image, Sequence

from modeling_trips import TripsProcessor, convert_to_rgb
from trips_examples.data.images import upright_size


logger = logging.getLogger(__name__)


def without_decoding(dataset: Dataset) -> Dataset:
    """The data set with `image` or `images` left encoded: a collator decodes an image once for all of its rows."""
    encoded = Image(decode=False)
    for column, feature in (("image", encoded), ("images", Sequence(encoded))):
        if column in dataset.column_names:
            dataset = dataset.cast_column(column, feature)
    return dataset


def read_image(row: dict) -> PIL.Image.Image:
    """The image of a row; where its `image` is not decoded, errors name the row."""
    encoded = row["image"]
    if isinstance(encoded, PIL.Image.Image):  # streams decode, to skip what is broken
        return encoded
    try:
        image = PIL.Image.open(encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"]))
        image.load()
    except Exception as error:  # Pillow's plugins raise errors of many kinds on broken files
        raise ValueError(f"{row['source']}: cannot read the image {encoded['path'] or ''}: {error}.") from error
    return image


def image_size(row: dict) -> tuple[int, int]:
    """(height, width) in pixels, upright, of the image of a row whose `image` column is not decoded."""
    encoded = row["image"]
    with PIL.Image.open(encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])) as image:
        return upright_size(image)[::-1]


class DecodedImages(torch.utils.data.Dataset):
    """The images of rows, decoded when they are asked for."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> PIL.Image.Image:
        return convert_to_rgb(read_image(self.rows[row]))


def images_of(dataset: Dataset) -> tuple[list[int], torch.LongTensor]:
    """The first row of each image, and for each row the position of its image among them."""
    rows = {}
    for row, image_id in enumerate(dataset["image_id"]):
        rows.setdefault(image_id, row)
    position = {image_id: index for index, image_id in enumerate(rows)}
    return list(rows.values()), torch.tensor([position[image_id] for image_id in dataset["image_id"]])


def one_row_per_image(dataset: Dataset) -> tuple[Dataset, list[list[str]]]:
    """The first row of each image, and all captions of each image."""
    rows, image_of_row = images_of(dataset)
    captions = [[] for _ in rows]
    for image, caption in zip(image_of_row.tolist(), dataset["caption"]):
        captions[image].append(caption)
    return dataset.select(rows), captions


def without_long_texts(data: DatasetDict, column: str, processor: TripsProcessor, skip: bool) -> DatasetDict:
    """
    The rows whose texts fit the model, found before training starts.

    Args:
        data (`DatasetDict`): splits with the columns `source` and `column`.
        column (`str`): the one of the texts.
        processor (`TripsProcessor`)
        skip (`bool`): whether to leave such rows out, with a warning that counts them, rather than to raise.

    Raises:
        ValueError: if some do not fit and `skip` is off, naming the first ones.
    """
    return DatasetDict({split: _without_long_texts(rows, column, processor, skip) for split, rows in data.items()})


def _without_long_texts(dataset: Dataset, column: str, processor: TripsProcessor, skip: bool) -> Dataset:
    limit = processor.tokenizer.model_max_length
    lengths = [len(ids) for ids in processor.tokenizer(processor.clean_text(list(dataset[column])))["input_ids"]]
    bad = [row for row, length in enumerate(lengths) if length > limit]
    if not bad:
        return dataset
    first = ", ".join(f"{dataset[row]['source']} ({lengths[row]} tokens)" for row in bad[:5])
    message = f"{len(bad)} of {len(dataset)} {column}s have more than {limit} tokens: {first}"
    if not skip:
        raise ValueError(f"{message}. Shorten them, or skip them with --skip_bad_rows.")
    logger.warning("Skipped: %s", message)
    return dataset.select([row for row, length in enumerate(lengths) if length <= limit])
