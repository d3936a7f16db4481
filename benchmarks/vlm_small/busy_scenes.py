"""Busy scenes: six to eight marked shapes on a textured background with clutter, and short questions about one shape.

A scene is drawn from its seed in about two milliseconds, so a training set needs no disk and no scene has to repeat.
The splits use different seeds.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import PIL.Image
import PIL.ImageDraw

from trips_examples.data.busy_scenes import (
    CELL_SIZE,
    COLORS,
    KINDS,
    PLACES,
    SHAPES,
    Question,
    Scene,
    draw_clutter,
    draw_ground,
    draw_item,
)
from trips_examples.data.scenes import SPLITS


IMAGE_SIZE = 96
CELLS = 4  # along each side; a cell holds at most one shape


@dataclass(frozen=True)
class Item:
    """One shape of a scene. `box` is (x0, y0, x1, y1) in pixels, x1 and y1 exclusive."""

    color: str
    shape: str
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str | None:
        """The quarter of the image that holds the shape, or None close to a border between quarters."""
        x0, y0, x1, y1 = self.box
        dx, dy = (x0 + x1 - IMAGE_SIZE) / 2, (y0 + y1 - IMAGE_SIZE) / 2
        if min(abs(dx), abs(dy)) < 6:
            return None
        return ("top" if dy < 0 else "bottom") + ("left" if dx < 0 else "right")


def vocabulary() -> list[str]:
    """Return all words of questions and answers, in a fixed order."""
    words = ["what", "color", "shape", "is", "the", "one", "where", "there", "a", "?", "yes", "no"]
    return [*words, *COLORS, *SHAPES, *PLACES]


def draw_scene(split: str, number: int, seed: int = 0) -> Scene:
    """Draw scene `number` of a split. Another `seed` gives other scenes."""
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
    rng = random.Random(f"busy {split} {seed} {number}")
    image = draw_ground(IMAGE_SIZE, rng)
    draw = PIL.ImageDraw.Draw(image)
    for _ in range(rng.randint(30, 45)):
        draw_clutter(draw, IMAGE_SIZE, rng)
    items = [_draw_item(draw, cell, rng) for cell in sorted(rng.sample(range(CELLS**2), rng.randint(6, 8)))]
    return Scene(image, items, list(_questions(items, rng)))


def one_of_each_kind(scene: Scene, number: int) -> list[Question]:
    """Draw one question of each kind that the scene has."""
    rng = random.Random(number)
    by_kind = {kind: [question for question in scene.questions if question.kind == kind] for kind in KINDS}
    return [rng.choice(questions) for questions in by_kind.values() if questions]


def _questions(items: list[Item], rng: random.Random) -> Iterator[Question]:
    for item in items:
        alone = {
            value: sum(value in (other.color, other.shape, other.name) for other in items) == 1
            for value in (item.color, item.shape, item.name)
        }
        if alone[item.shape]:
            yield Question("color", f"what color is the {item.shape} ?", item.color, item.box)
        if alone[item.color]:
            yield Question("shape", f"what shape is the {item.color} one ?", item.shape, item.box)
        names = [f"the {item.color} one"] * alone[item.color] + [f"the {item.shape}"] * alone[item.shape]
        names += [f"the {item.name}"] * alone[item.name]
        if not names:
            continue
        if item.place is not None:
            yield Question("place", f"where is {rng.choice(names)} ?", item.place, item.box)
        if alone[item.name]:
            yield Question("presence", f"is there a {item.name} ?", "yes", item.box)
    # An absent item combines a color and a shape of the scene, so that neither alone gives the answer.
    absent = {f"{a.color} {b.shape}" for a in items for b in items} - {item.name for item in items}
    for name in rng.sample(sorted(absent), min(len(items), len(absent))):
        yield Question("presence", f"is there a {name} ?", "no", None)


def _draw_item(draw: PIL.ImageDraw.ImageDraw, cell: int, rng: random.Random) -> Item:
    size = rng.randint(17, 22)
    x0 = cell % CELLS * CELL_SIZE + rng.randint(0, CELL_SIZE - size)
    y0 = cell // CELLS * CELL_SIZE + rng.randint(0, CELL_SIZE - size)
    item = Item(rng.choice(list(COLORS)), rng.choice(SHAPES), (x0, y0, x0 + size, y0 + size))
    draw_item(draw, item.color, item.shape, item.box, rng)
    return item
