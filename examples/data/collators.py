"""Sampling by image, batching with each image decoded once, and augmentation."""

import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import PIL.Image
import torch
from torch.utils.data import Sampler
from torchvision.transforms.v2 import functional as F

from modeling_trips import TripsProcessor
from trips_examples.data.rows import first_rows, read_image


class ImageGroupedSampler(Sampler[int]):
    """
    Sampler of rows in random order, with up to `group_size` rows of one image next to each other, so that they share
    its cached image states.

    Args:
        image_ids (`Sequence[Hashable]`): image or images of each row.
        group_size (`int`): number of rows of an image that stay together.
        seed (`int`): seed of the order, together with the epoch. All processes have the same order.
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
    Base of collators from rows with encoded images to model inputs. Each image is decoded once per batch. Subclasses
    implement `encode`. A batch also has `sources`, the sources of its rows for error messages, which
    [`ImageGroupedTrainer`] removes.

    Args:
        processor (`TripsProcessor`)
        training (`bool`): whether the batches are for training.
        augment (`bool`): whether to apply random flips and shifts in training, see `augmented`.

    Raises:
        `ValueError`: A batch cannot be made. The message names its rows.
    """

    processor: TripsProcessor
    training: bool = False
    augment: bool = False

    flips: ClassVar[bool] = True  # whether `augmented` may flip images

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
        """Return the inputs and labels of the model. Row i has image `image_index[i]`."""
        raise NotImplementedError

    def distinct_images(self, rows: list[dict]) -> tuple[list[PIL.Image.Image], list]:
        """Return the distinct images of the rows, upright and RGB, and the index of each row's image."""
        return distinct_images(rows, self.processor.patch_size)

    def augmented(
        self, images: list[PIL.Image.Image], image_index: list, rows: list[dict]
    ) -> tuple[list[PIL.Image.Image], list[dict]]:
        """Shift the images, flip them if `flips`, and keep the rows."""
        return [move_image(image, draw_move(image.size, self.flips)) for image in images], rows


def distinct_images(rows: list[dict], patch_size: int) -> tuple[list[PIL.Image.Image], list[int]]:
    """Return the distinct images of rows with `image`, `image_id` and `source`, and the index of each row's image."""
    firsts, image_index = first_rows([row["image_id"] for row in rows])
    return [read_image(rows[first], patch_size) for first in firsts], image_index


class Move(NamedTuple):
    """Augmentation of an image: an optional horizontal flip, then a shift left and up in pixels."""

    flips: bool
    left: int
    up: int


def draw_move(size: tuple[int, int], flips: bool = True) -> Move:
    """Draw a flip or none (none without `flips`), and a shift by up to an eighth of an image's (width, height)."""
    flips = bool(torch.rand(()) < 0.5) and flips
    pad_x, pad_y = (length // 8 for length in size)
    up, left = (int(torch.randint(2 * pad + 1, ())) - pad for pad in (pad_y, pad_x))
    return Move(flips, left, up)


def move_image(image: PIL.Image.Image, move: Move) -> PIL.Image.Image:
    """Apply a move to an image. Its border pixels fill the gap."""
    image = F.horizontal_flip(image) if move.flips else image
    pad_x, pad_y = abs(move.left), abs(move.up)
    padded = F.pad(image, [pad_x, pad_y], padding_mode="edge")
    return F.crop(padded, pad_y + move.up, pad_x + move.left, image.height, image.width)


def move_box(box: Sequence[float], move: Move, size: tuple[int, int]) -> list[float]:
    """Apply a move to a box (x0, y0, x1, y1) in an image of `size` (width, height) and clip it, maybe to nothing."""
    x0, y0, x1, y1 = box
    width, height = size
    if move.flips:
        x0, x1 = width - x1, width - x0
    across = [min(max(x - move.left, 0), width) for x in (x0, x1)]
    down = [min(max(y - move.up, 0), height) for y in (y0, y1)]
    return [across[0], down[0], across[1], down[1]]
