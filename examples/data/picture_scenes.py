"""Composed scenes of named images: several images of different sizes on a background, without overlap.

A scene is rendered from its recipe, a few numbers, whenever it is read. No scene is kept in memory or on disk.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import PIL.Image
import PIL.ImageDraw

from trips_examples.data.pictures import NamedPicture, load_picture


SMALLEST, LARGEST = 0.14, 0.5  # longer side of an image, as a share of the scene's side
NUM_TRIES = 60  # attempts to find a free place before the image is made smaller
SHRINK = 0.8
REPEAT_PROBABILITY = 0.5  # probability that a scene has two or three images of one name


class Thing(NamedTuple):
    """A named image in a scene, and its box (x0, y0, x1, y1) in pixels, x1 and y1 exclusive."""

    picture: NamedPicture
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return self.picture.name

    @property
    def area(self) -> int:
        x0, y0, x1, y1 = self.box
        return (x1 - x0) * (y1 - y0)

    @property
    def center(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


class Recipe(NamedTuple):
    """
    Recipe of a scene.

    Args:
        number (`int`): seed of the scene.
        picture (`int`, *optional*, defaults to -1): index of a named image that is controlled; -1 for none.
        has_picture (`bool`, *optional*, defaults to `True`): whether the scene contains the controlled image exactly
            once, or no image of its name.
    """

    number: int
    picture: int = -1
    has_picture: bool = True


@dataclass(frozen=True)
class SceneMaker:
    """
    Generator of the scenes of a split.

    Args:
        pictures (`tuple[NamedPicture, ...]`): named images, with at least two names.
        split (`str`), seed (`int`): seed of the scenes, together with a scene's number.
        side (`int`): height and width of the scenes in pixels.
        counts (`tuple[int, int]`): smallest and largest number of images in a scene.
    """

    pictures: tuple[NamedPicture, ...]
    split: str
    seed: int = 0
    side: int = 224
    counts: tuple[int, int] = (2, 9)

    def __post_init__(self):
        if len(self.by_name) < 2:
            raise ValueError(
                f"The {self.split} scenes need images with at least two names, got {len(self.by_name)} names. Give a "
                "longer list, or another share of names (--validation_names, --test_names)."
            )

    @cached_property
    def names(self) -> list[str]:
        return sorted(self.by_name)

    @cached_property
    def by_name(self) -> dict[str, list[NamedPicture]]:
        groups = defaultdict(list)
        for picture in self.pictures:
            groups[picture.name].append(picture)
        return dict(groups)

    def rng(self, number: int, purpose: str = "layout") -> random.Random:
        return random.Random(f"{self.seed} {self.split} {number} {purpose}")

    def things(self, recipe: Recipe) -> tuple[Thing, ...]:
        """Return the objects of a scene with their boxes. Objects that do not fit are left out."""
        rng = self.rng(recipe.number)
        wanted = self.pictures[recipe.picture] if recipe.picture >= 0 else None
        pictures = self._choose(rng, wanted, recipe.has_picture)
        largest = min(LARGEST, 1.1 / len(pictures) ** 0.5)
        sides = [rng.uniform(SMALLEST, largest) for _ in pictures]
        things: list[Thing] = []
        # The controlled image is placed first, then the largest ones, so that they fit.
        for picture, side in sorted(zip(pictures, sides), key=lambda pair: (pair[0] != wanted, -pair[1])):
            box = self._free_box(rng, picture, round(side * self.side), [thing.box for thing in things])
            if box is not None:
                things.append(Thing(picture, box))
        return tuple(things)

    def _choose(self, rng: random.Random, wanted: NamedPicture | None, has_wanted: bool) -> list[NamedPicture]:
        """Draw images with distinct names. Some scenes repeat one name, but never that of `wanted`."""
        names = [name for name in self.names if wanted is None or name != wanted.name]
        names = rng.sample(names, min(rng.randint(*self.counts), len(names)))
        pictures = [rng.choice(self.by_name[name]) for name in names]
        if len(pictures) > 2 and rng.random() < REPEAT_PROBABILITY:
            for place in range(1, min(rng.choice((2, 3)), len(pictures) - 1)):
                pictures[place] = rng.choice(self.by_name[names[0]])
        if wanted is not None and has_wanted:
            pictures[-1] = wanted
        return pictures

    def _free_box(
        self, rng: random.Random, picture: NamedPicture, longest: int, taken: list[tuple[int, int, int, int]]
    ) -> tuple[int, int, int, int] | None:
        while longest >= SMALLEST / 2 * self.side:
            width, height = (max(1, round(side * longest / max(picture.size))) for side in picture.size)
            for _ in range(NUM_TRIES):
                x, y = rng.randint(0, self.side - width), rng.randint(0, self.side - height)
                box = (x, y, x + width, y + height)
                if not any(_overlap(box, other) for other in taken):
                    return box
            longest = int(longest * SHRINK)
        return None

    def render(self, recipe: Recipe) -> PIL.Image.Image:
        """Return the scene as an RGB image."""
        rng = self.rng(recipe.number, "background")
        scene = (_busy if rng.random() < 0.5 else _plain)(rng, self.side)
        for picture, (x0, y0, x1, y1) in self.things(recipe):
            image = load_picture(picture, round(LARGEST * self.side)).resize((x1 - x0, y1 - y0))
            scene.paste(image, (x0, y0), image)
        return scene


def _overlap(box: Sequence[int], other: Sequence[int]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def _color(rng: random.Random, darkest: int = 0) -> tuple[int, int, int]:
    red, green, blue = (rng.randint(darkest, 255) for _ in range(3))
    return red, green, blue


def _plain(rng: random.Random, side: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (side, side), _color(rng, darkest=128))


def _busy(rng: random.Random, side: int) -> PIL.Image.Image:
    """Draw clouds of colors, crossed by lines."""
    clouds = PIL.Image.frombytes("RGB", (6, 6), rng.randbytes(6 * 6 * 3))
    scene = clouds.resize((side, side), PIL.Image.Resampling.BICUBIC)
    draw = PIL.ImageDraw.Draw(scene)
    for _ in range(12):
        ends = [rng.randint(0, side) for _ in range(4)]
        draw.line(ends, fill=_color(rng), width=rng.randint(1, max(1, side // 64)))
    return scene
