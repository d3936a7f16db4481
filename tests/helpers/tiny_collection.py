"""A collection of small distinct images in all supported formats, and a retrieval model to embed them."""

import pyarrow as pa
import pyarrow.parquet
import strange_pictures
from random_checkpoint import save_random_checkpoint

from modeling_trips import TripsForRetrieval


TEXTS = ["a red circle", "blue", "a green one on the left", "the rectangle"]


def save_model(folder, **fields):
    return str(save_random_checkpoint(folder, TripsForRetrieval, TEXTS, **fields))


def encoded(number):
    return strange_pictures.encoded(strange_pictures.noise(6, 6, number).resize((64, 64)))


def write_images(folder, numbers):
    """`0.png`, `1.png`, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(encoded(number))
    return folder


def write_parquet(file, numbers):
    """Write images as the datasets library does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(number), "path": None} for number in numbers]
    pyarrow.parquet.write_table(pa.table({"image": images}), file)
    return file
