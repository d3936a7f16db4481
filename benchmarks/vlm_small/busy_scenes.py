"""Busy scenes: six to eight marked shapes on a textured background with clutter, and short questions about one shape.

A scene is drawn from its seed in about two milliseconds, so a training set needs no disk and no scene has to repeat.
The splits use different seeds.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw


COLORS = {
    "red": (205, 40, 45),
    "green": (40, 150, 60),
    "blue": (45, 80, 205),
    "yellow": (230, 205, 50),
    "purple": (135, 50, 160),
    "orange": (240, 130, 30),
    "cyan": (60, 200, 210),
    "pink": (240, 130, 180),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
MARKS = ("dot", "bar", "dash", "ring")  # inside the shapes; no question asks about them
PLACES = ("topleft", "topright", "bottomleft", "bottomright")
KINDS = ("color", "shape", "place", "presence")

IMAGE_SIZE = 96
CELLS = 4  # along each side; a cell holds at most one shape
SPLITS = ("train", "validation", "test")


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


@dataclass(frozen=True)
class Question:
    """A question. `region` is the box of its shape, or None if the shape is absent."""

    kind: str
    text: str
    answer: str
    region: tuple[int, int, int, int] | None


@dataclass(frozen=True, eq=False)
class Scene:
    """An image with its items and all questions about it."""

    image: PIL.Image.Image
    items: list[Item]
    questions: list[Question]


def vocabulary() -> list[str]:
    """Return all words of questions and answers, in a fixed order."""
    words = ["what", "color", "shape", "is", "the", "one", "where", "there", "a", "?", "yes", "no"]
    return [*words, *COLORS, *SHAPES, *PLACES]


def draw_scene(split: str, number: int, seed: int = 0) -> Scene:
    """Draw scene `number` of a split. Another `seed` gives other scenes."""
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
    rng = random.Random(f"busy {split} {seed} {number}")
    image = _ground(rng)
    draw = PIL.ImageDraw.Draw(image)
    for _ in range(rng.randint(30, 45)):
        _draw_clutter(draw, rng)
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


def _ground(rng: random.Random) -> PIL.Image.Image:
    noise = np.random.default_rng(rng.getrandbits(64))
    coarse = noise.uniform(60, 190, (rng.randint(3, 8), rng.randint(3, 8), 3)).astype(np.uint8)
    ground = PIL.Image.fromarray(coarse).resize((IMAGE_SIZE, IMAGE_SIZE), PIL.Image.Resampling.BICUBIC)
    texture = np.asarray(ground, dtype=np.float32)
    texture = texture.mean(-1, keepdims=True) * 0.5 + texture * 0.5 + noise.normal(0, 10, texture.shape)
    return PIL.Image.fromarray(texture.clip(0, 255).astype(np.uint8))


def _shade(color: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    light = rng.randint(-18, 18)
    return tuple(min(255, max(0, value + light + rng.randint(-8, 8))) for value in color)


def _draw_clutter(draw: PIL.ImageDraw.ImageDraw, rng: random.Random):
    """Draw a thin line, an outline or a few dots, often in the color of a shape."""
    named = rng.random() < 0.6
    color = _shade(rng.choice(list(COLORS.values())) if named else (rng.randint(0, 255),) * 3, rng)
    x, y, angle, length = rng.uniform(0, 96), rng.uniform(0, 96), rng.uniform(0, 2 * math.pi), rng.uniform(4, 14)
    end = (x + length * math.cos(angle), y + length * math.sin(angle))
    form = rng.randrange(3)
    if form == 0:
        draw.line([(x, y), end], fill=color, width=rng.randint(1, 2))
    elif form == 1:
        draw.arc([x, y, x + length, y + length], 360 * rng.random(), 360 * rng.random() + 200, fill=color)
    else:
        for _ in range(4):
            a, b = x + rng.uniform(-6, 6), y + rng.uniform(-6, 6)
            draw.rectangle([a, b, a + rng.randint(1, 2), b + rng.randint(1, 2)], fill=color)


def _draw_item(draw: PIL.ImageDraw.ImageDraw, cell: int, rng: random.Random) -> Item:
    side, size = IMAGE_SIZE // CELLS, rng.randint(17, 22)
    x0 = cell % CELLS * side + rng.randint(0, side - size)
    y0 = cell // CELLS * side + rng.randint(0, side - size)
    item = Item(rng.choice(list(COLORS)), rng.choice(SHAPES), (x0, y0, x0 + size, y0 + size))
    fill, edge = _shade(COLORS[item.color], rng), _shade((25, 25, 25), rng)
    x1, y1, middle_x, middle_y = x0 + size - 1, y0 + size - 1, x0 + (size - 1) / 2, y0 + (size - 1) / 2
    if item.shape == "circle":
        draw.ellipse([x0, y0, x1, y1], fill=fill, outline=edge)
    elif item.shape == "square":
        draw.rectangle([x0 + 1, y0 + 1, x1 - 1, y1 - 1], fill=fill, outline=edge)
    else:
        corners = _corners(item.shape)
        points = [(middle_x + x * (size - 1) / 2, middle_y + y * (size - 1) / 2) for x, y in corners]
        draw.polygon(points, fill=fill, outline=edge)
    _draw_mark(draw, rng.choice(MARKS), middle_x, middle_y + (2 if item.shape == "triangle" else 0))
    return item


def _corners(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a polygon in the square from (-1, -1) to (1, 1)."""
    if shape == "triangle":
        return [(0, -1), (1, 1), (-1, 1)]
    if shape == "diamond":
        return [(0, -1), (1, 0), (0, 1), (-1, 0)]
    if shape == "cross":
        a = 0.4
        xs = (-a, a, a, 1, 1, a, a, -a, -a, -1, -1, -a)
        ys = (-1, -1, -a, -a, a, a, 1, 1, a, a, -a, -a)
        return list(zip(xs, ys))
    angles = [math.pi * (corner / 5 - 0.5) for corner in range(10)]
    return [
        (math.cos(angle) * (1.0, 0.5)[corner % 2], math.sin(angle) * (1.0, 0.5)[corner % 2])
        for corner, angle in enumerate(angles)
    ]


def _draw_mark(draw: PIL.ImageDraw.ImageDraw, mark: str, x: float, y: float):
    x, y, white = round(x), round(y), (255, 255, 255)
    if mark == "dot":
        draw.rectangle([x - 1, y - 1, x + 1, y + 1], fill=white)
    elif mark == "bar":
        draw.rectangle([x, y - 3, x + 1, y + 3], fill=white)
    elif mark == "dash":
        draw.rectangle([x - 3, y, x + 3, y + 1], fill=white)
    else:
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], outline=white, width=1)
