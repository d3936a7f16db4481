"""From rows to batches: sampling by image, images decoded once per batch, augmentation."""

import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch.utils.data import Sampler
from torchvision.transforms.v2 import functional as F

from modeling_trips import TripsProcessor
from trips_examples.data.rows import read_image


class ImageGroupedSampler(Sampler[int]):
    """
    Rows in random order, but up to `group_size` rows of one image next to each other, so that they share its cached
    image states.

    Args:
        image_ids (`Sequence[Hashable]`): the image (or the images) of each row.
        group_size (`int`): how many rows of an image stay together. All rows are drawn once per epoch.
        seed (`int`): with the epoch it determines the order, in every process alike.
    """

    def __init__(self, image_ids: Sequence[Hashable], group_size: int, seed: int = 0):
        self.group_size, self.seed, self.epoch = group_size, seed, 0
        rows_by_image = defaultdict(list)
        for row, image_id in enumerate(image_ids):
            rows_by_image[image_id].append(row)
        self.rows_by_image = list(rows_by_image.values())

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.rows_by_image))

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}-{self.epoch}")
        groups = []
        for rows in self.rows_by_image:
            rows = rng.sample(rows, len(rows))
            groups += [rows[start : start + self.group_size] for start in range(0, len(rows), self.group_size)]
        rng.shuffle(groups)
        return chain.from_iterable(groups)


@dataclass
class ImageBatchCollator:
    """
    Rows of a data set whose images are not decoded -> inputs of a model. Each image is decoded and comes once, however
    many rows are about it. A task's collator says in `encode` what the inputs are. Beside them a batch has `sources`,
    where its rows are from, for errors; [`ImageGroupedTrainer`] takes them out again.

    Args:
        processor (`TripsProcessor`)
        training (`bool`): whether the batches are to train on.
        augment (`bool`): random flips and shifts in training, see `augmented`.

    Raises:
        `ValueError`: Where a batch cannot be made, naming its rows.
    """

    processor: TripsProcessor
    training: bool = False
    augment: bool = False

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        images, image_index = self.distinct_images(rows)
        try:
            if self.augment and self.training:
                images, rows = self.augmented(images, image_index, rows)
            inputs = self.encode(images, image_index, rows)
        except ValueError as error:
            sources = ", ".join(row["source"] for row in rows)
            raise ValueError(f"{str(error).rstrip('.')}. The batch is: {sources}.") from error
        return {**inputs, "sources": [row["source"] for row in rows]}

    def encode(self, images: list[PIL.Image.Image], image_index: list, rows: list[dict]) -> dict[str, torch.Tensor]:
        """The inputs and labels of the model. Row i is about image `image_index[i]`."""
        raise NotImplementedError

    def distinct_images(self, rows: list[dict]) -> tuple[list[PIL.Image.Image], list]:
        """The images of the rows, each once, upright and RGB, and for each row the position of its own."""
        return distinct_images(rows, self.processor.patch_size)

    def augmented(
        self, images: list[PIL.Image.Image], image_index: list, rows: list[dict]
    ) -> tuple[list[PIL.Image.Image], list[dict]]:
        """The images flipped and shifted, and the rows as they are: for tasks that do not depend on the place."""
        return [flip_and_shift(image) for image in images], rows


def distinct_images(rows: list[dict], patch_size: int) -> tuple[list[PIL.Image.Image], list[int]]:
    """The images of rows with `image`, `image_id` and `source`, each once, and for each row its image's position."""
    first_rows = {}
    for row in rows:
        first_rows.setdefault(row["image_id"], row)
    position = {image_id: index for index, image_id in enumerate(first_rows)}
    return [read_image(row, patch_size) for row in first_rows.values()], [position[row["image_id"]] for row in rows]


class Move(NamedTuple):
    """How an image is augmented: flipped sideways or not, then moved to the left and upwards by so many pixels."""

    flips: bool
    left: int
    up: int


def draw_move(size: tuple[int, int], max_shift: float = 0.125) -> Move:
    """A flip or none, and a shift by up to `max_shift` of an image's `size` (width, height)."""
    flips = bool(torch.rand(()) < 0.5)
    pad_x, pad_y = (int(length * max_shift) for length in size)
    up, left = (int(torch.randint(2 * pad + 1, ())) - pad for pad in (pad_y, pad_x))
    return Move(flips, left, up)


def move_image(image: PIL.Image.Image, move: Move) -> PIL.Image.Image:
    """The image moved; its border fills what opens up."""
    image = F.horizontal_flip(image) if move.flips else image
    pad_x, pad_y = abs(move.left), abs(move.up)
    padded = F.pad(image, [pad_x, pad_y], padding_mode="edge")
    return F.crop(padded, pad_y + move.up, pad_x + move.left, image.height, image.width)


def move_box(box: Sequence[float], move: Move, size: tuple[int, int]) -> list[float]:
    """A box (x0, y0, x1, y1) in an image of `size` (width, height) moved with it, and cut to it: it may get empty."""
    x0, y0, x1, y1 = box
    width, height = size
    if move.flips:
        x0, x1 = width - x1, width - x0
    across = [min(max(x - move.left, 0), width) for x in (x0, x1)]
    down = [min(max(y - move.up, 0), height) for y in (y0, y1)]
    return [across[0], down[0], across[1], down[1]]


def flip_and_shift(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image, flipped sideways or not, moved by up to an eighth of its size."""
    return move_image(image, draw_move(image.size))


def shift(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image moved by up to an eighth of its size."""
    return move_image(image, draw_move(image.size)._replace(flips=False))
