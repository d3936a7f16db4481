"""Busy scenes: marked shapes on a textured background with clutter in the same colors, and texts about one shape each.

A scene is drawn from its seed in about three milliseconds, so a training set needs no disk. The splits use different
seeds. Shapes do not follow the grid of the patches, and clutter has the colors of the shapes.
"""

import io
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

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
MARKS = ("dot", "bar", "dash", "ring")  # inside the shapes; no text is about them
PLACES = ("topleft", "topright", "bottomleft", "bottomright")
KINDS = ("color", "shape", "place", "presence")

CELL_SIZE = 24  # pixels; a cell holds at most one shape
NUM_ITEMS = {1: (1, 1), 2: (2, 4), 3: (3, 6), 4: (6, 8)}  # fewest and most shapes by the number of cells per side
QUESTIONS_PER_KIND = 2
STATEMENTS_PER_PAIR = 8

# Whether the left and the right image have what a statement names, if it is true and if it is false.
STATEMENTS = {
    "both images have {}": ([(True, True)], [(True, False), (False, True)]),
    "only the left image has {}": ([(True, False)], [(True, True), (False, False)]),
    "only the right image has {}": ([(False, True)], [(True, True), (False, False)]),
    "only one image has {}": ([(True, False), (False, True)], [(True, True), (False, False)]),
    "both images have {} or neither has": ([(True, True), (False, False)], [(True, False), (False, True)]),
}


@dataclass(frozen=True)
class Item:
    """One shape of a scene. `box` is (x0, y0, x1, y1) in pixels, x1 and y1 exclusive."""

    color: str
    shape: str
    box: tuple[int, int, int, int]
    place: str  # the quarter of the image that holds the shape

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Question:
    """A question. `region` is the box of its shape, or None if the shape is absent."""

    kind: str
    text: str
    answer: str
    region: tuple[int, int, int, int] | None


@dataclass(frozen=True, eq=False)
class Scene:
    """An image with its items and questions, `QUESTIONS_PER_KIND` of each kind."""

    image: PIL.Image.Image
    items: list[Item]
    questions: list[Question]


def draw_scene(split: str, number: int, seed: int = 0, grid: int = 4) -> Scene:
    """Draw scene `number` of a split, of `grid` x `grid` cells. Another `seed` gives other scenes."""
    rng = random.Random(f"busy {split} {seed} {number}")
    side = grid * CELL_SIZE
    image = draw_ground(side, rng)
    draw = PIL.ImageDraw.Draw(image)
    for _ in range(rng.randint(2 * grid**2, 3 * grid**2)):
        draw_clutter(draw, side, rng)
    cells = sorted(rng.sample(range(grid**2), rng.randint(*NUM_ITEMS[grid])))
    while True:
        names = [(rng.choice(list(COLORS)), rng.choice(SHAPES)) for _ in cells]
        items = [_place_item(*name, cell, grid, rng) for name, cell in zip(names, cells)]
        questions = _questions(items, grid, rng)
        if grid < 4 or len(questions) == QUESTIONS_PER_KIND * len(KINDS):
            break
    for item in items:
        draw_item(draw, item.color, item.shape, item.box, rng)
    return Scene(image, items, questions)


def encoded(image: PIL.Image.Image) -> dict:
    """Return an image as PNG in the form that `datasets.Image` takes."""
    png = io.BytesIO()
    image.save(png, "PNG", compress_level=1)
    return {"bytes": png.getvalue(), "path": None}


def check_busy_scenes(task: str, numbers: Iterable[int], grid: int):
    """Raise a `ValueError` if `busy_records` cannot draw so many scenes of the splits."""
    fewest = 2 if task == "nlvr2" else 1  # statements name what both images have, and what one of them has
    if not fewest <= grid <= max(NUM_ITEMS):
        raise ValueError(f"grid is {grid}: choose {fewest} to {max(NUM_ITEMS)} cells along each side of a scene.")
    if min(numbers) < 1:
        raise ValueError(f"The number of scenes is {min(numbers)}: choose at least 1 for each split.")


def busy_records(task: str, split: str, num_scenes: int, grid: int = 4, seed: int = 0) -> Iterator[dict]:
    """
    Draw scenes with their texts.

    - `"vqa"`: `QUESTIONS_PER_KIND` questions of each kind: the color of the only shape of a form, the form of the only
      one of a color, the quarter that holds the only one of a color or a form, and the presence of a color and a form,
      once with "yes" and once with "no". `region`: the box of the shape; None if it is absent.
    - `"captions"`: two captions of each scene, each with color, form and quarter of all shapes in random order.
    - `"grounding"`: an expression for each shape that is unique by color, form or both. `box`: the box of the shape.
    - `"nlvr2"`: `STATEMENTS_PER_PAIR` statements about two scenes ("only one image has a red circle"), as often true
      as false. A scene without a red circle has something red or a circle.

    Args:
        task (`str`): `"vqa"`, `"captions"`, `"grounding"` or `"nlvr2"`.
        split (`str`): `"train"`, `"validation"` or `"test"`.
        num_scenes (`int`): Number of scenes, at least 1; for `"nlvr2"` of pairs. The first scenes do not depend on it.
        grid (`int`, *optional*, defaults to 4): Cells of 24 x 24 pixels along each side, 1 to 4. Scenes of fewer cells
            are easier and may lack questions of a kind; up to 2 x 2 have none for places. Statements need 2.
        seed (`int`, *optional*, defaults to 0)

    Yields:
        `dict`: Records in the columns that `load_task_dataset` reads. Boxes are (x0, y0, x1, y1) in pixels, x1 and y1
        exclusive. Records of one scene have equal `image_id`.
    """
    if task == "nlvr2":
        yield from _statement_records(split, num_scenes, grid, seed)
        return
    for number in range(num_scenes):
        scene = draw_scene(split, number, seed, grid)
        shared = {"image": encoded(scene.image), "image_id": f"{split} scene {number + 1}"}
        rng = random.Random(f"texts {split} {seed} {number}")
        if task == "captions":
            yield {**shared, "captions": [_caption(scene, grid, rng) for _ in range(2)]}
        elif task == "vqa":
            for question in scene.questions:
                region = None if question.region is None else list(question.region)
                fields = {"kind": question.kind, "question": question.text, "answer": question.answer}
                yield {**shared, **fields, "region": region}
        else:
            for expression, item in _expressions(scene, rng):
                yield {**shared, "expression": expression, "box": list(item.box)}


def _statement_records(split: str, num_pairs: int, grid: int, seed: int) -> Iterator[dict]:
    numbers = count()
    for pair in range(num_pairs):
        rng = random.Random(f"texts {split} {seed} {pair}")
        while True:
            drawn = [next(numbers), next(numbers)]
            scenes = [draw_scene(split, number, seed, grid) for number in drawn]
            left, right = ({True: _present(scene.items), False: _absent(scene.items)} for scene in scenes)
            named = {(a, b): sorted(left[a] & right[b]) for a in left for b in right}
            if all(named.values()):
                break
        shared = {
            "images": [encoded(scene.image) for scene in scenes],
            "image_ids": [f"{split} scene {number + 1}" for number in drawn],
        }
        for number in range(STATEMENTS_PER_PAIR):
            statement, (if_true, if_false) = rng.choice(list(STATEMENTS.items()))
            label = number % 2 == 0
            name = rng.choice(named[rng.choice(if_true if label else if_false)])
            yield {**shared, "statement": statement.format(f"a {name}"), "label": label}


def _present(items: list[Item]) -> set[str]:
    return {item.name for item in items}


def _absent(items: list[Item]) -> set[str]:
    """Return the names of absent shapes that have the color or the form of one in the scene."""
    colors, shapes = ({getattr(item, field) for item in items} for field in ("color", "shape"))
    near = {f"{color} {shape}" for color in COLORS for shape in SHAPES if color in colors or shape in shapes}
    return near - _present(items)


def _caption(scene: Scene, grid: int, rng: random.Random) -> str:
    items = rng.sample(scene.items, len(scene.items))
    if grid == 1:  # the only cell is no place
        return f"a {items[0].name}"
    return ", ".join(f"a {item.name} at the {item.place}" for item in items)


def _expressions(scene: Scene, rng: random.Random) -> Iterator[tuple[str, Item]]:
    names = [(f"{item.color} one", item.shape, item.name) for item in scene.items]
    times = Counter(name for group in names for name in group)
    for group, item in zip(names, scene.items, strict=True):
        if unique := [name for name in group if times[name] == 1]:
            yield f"the {rng.choice(unique)}", item


def _questions(items: list[Item], grid: int, rng: random.Random) -> list[Question]:
    """Return `QUESTIONS_PER_KIND` questions of each kind, or fewer if the items do not allow them."""
    times = Counter(value for item in items for value in (item.color, item.shape, item.name))
    pools: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for item in items:
        by_color, by_shape, by_name = (times[value] == 1 for value in (item.color, item.shape, item.name))
        if by_shape:
            pools["color"].append(Question("color", f"what color is the {item.shape}?", item.color, item.box))
        if by_color:
            pools["shape"].append(Question("shape", f"what shape is the {item.color} one?", item.shape, item.box))
        names = [f"the {item.color} one"] * by_color + [f"the {item.shape}"] * by_shape
        if names and grid > 2:  # in small scenes, [CLS] alone tells which quarters hold shapes
            pools["place"].append(Question("place", f"where is {rng.choice(names)}?", item.place, item.box))
        if by_name:
            pools["presence"].append(Question("presence", f"is there a {item.name}?", "yes", item.box))
    # An absent item combines a color and a shape of the scene, so that neither alone gives the answer.
    absent = sorted({f"{a.color} {b.shape}" for a in items for b in items} - _present(items))
    pools["absence"] = [Question("presence", f"is there a {name}?", "no", None) for name in absent]
    numbers = dict.fromkeys(KINDS, QUESTIONS_PER_KIND) | {"presence": 1, "absence": 1}
    chosen = ((pools[kind], min(number, len(pools[kind]))) for kind, number in numbers.items())
    return [question for pool, number in chosen for question in rng.sample(pool, number)]


def draw_ground(side: int, rng: random.Random) -> PIL.Image.Image:
    """Return a textured background of `side` x `side` pixels."""
    noise = np.random.default_rng(rng.getrandbits(64))
    coarse = noise.uniform(60, 190, (rng.randint(3, 8), rng.randint(3, 8), 3)).astype(np.uint8)
    ground = PIL.Image.fromarray(coarse).resize((side, side), PIL.Image.Resampling.BICUBIC)
    texture = np.asarray(ground, dtype=np.float32)
    texture = texture.mean(-1, keepdims=True) * 0.5 + texture * 0.5 + noise.normal(0, 10, texture.shape)
    return PIL.Image.fromarray(texture.clip(0, 255).astype(np.uint8))


def _shade(color: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    light = rng.randint(-18, 18)
    return tuple(min(255, max(0, value + light + rng.randint(-8, 8))) for value in color)


def draw_clutter(draw: PIL.ImageDraw.ImageDraw, side: int, rng: random.Random):
    """Draw a thin line, an outline or a few dots, often in the color of a shape."""
    named = rng.random() < 0.6
    color = _shade(rng.choice(list(COLORS.values())) if named else (rng.randint(0, 255),) * 3, rng)
    x, y, angle, length = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0, 2 * math.pi), rng.uniform(4, 14)
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


def _place_item(color: str, shape: str, cell: int, grid: int, rng: random.Random) -> Item:
    (row, column), size = divmod(cell, grid), rng.randint(17, 22)
    x0, y0 = (index * CELL_SIZE + rng.randint(0, CELL_SIZE - size) for index in (column, row))
    place = ("top" if 2 * row < grid else "bottom") + ("left" if 2 * column < grid else "right")
    return Item(color, shape, (x0, y0, x0 + size, y0 + size), place)


def draw_item(
    draw: PIL.ImageDraw.ImageDraw, color: str, shape: str, box: tuple[int, int, int, int], rng: random.Random
):
    """Draw a shape with a random mark in its square box (x0, y0, x1, y1), x1 and y1 exclusive."""
    x0, y0, size = box[0], box[1], box[2] - box[0]
    fill, edge = _shade(COLORS[color], rng), _shade((25, 25, 25), rng)
    x1, y1, middle_x, middle_y = x0 + size - 1, y0 + size - 1, x0 + (size - 1) / 2, y0 + (size - 1) / 2
    if shape == "circle":
        draw.ellipse([x0, y0, x1, y1], fill=fill, outline=edge)
    elif shape == "square":
        draw.rectangle([x0 + 1, y0 + 1, x1 - 1, y1 - 1], fill=fill, outline=edge)
    else:
        corners = _corners(shape)
        points = [(middle_x + x * (size - 1) / 2, middle_y + y * (size - 1) / 2) for x, y in corners]
        draw.polygon(points, fill=fill, outline=edge)
    _draw_mark(draw, rng.choice(MARKS), middle_x, middle_y + (2 if shape == "triangle" else 0))


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
