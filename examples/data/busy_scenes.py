"""Busy scenes: marked shapes on a textured background with clutter in the same colors, and texts about one shape each.

Shapes do not follow the grid of the patches. The splits use different seeds.
"""

import io
import math
import random
from collections import Counter
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

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
# White marks inside the shapes, as boxes around the center; no text is about them.
MARKS = {"dot": (-1, -1, 1, 1), "bar": (0, -3, 1, 3), "dash": (-3, 0, 3, 1), "ring": (-3, -3, 3, 3)}
# Corners of polygons in the square from (-1, -1) to (1, 1)
_CROSS = (-0.4, 0.4, 0.4, 1, 1, 0.4, 0.4, -0.4, -0.4, -1, -1, -0.4)
_RAYS = [(math.pi * (corner / 5 - 0.5), (1.0, 0.5)[corner % 2]) for corner in range(10)]
POLYGONS: dict[str, list[tuple[float, float]]] = {
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "cross": list(zip(_CROSS, _CROSS[-3:] + _CROSS[:-3])),
    "star": [(math.cos(angle) * length, math.sin(angle) * length) for angle, length in _RAYS],
}
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


class Item(NamedTuple):
    """One shape of a scene. `box` is (x0, y0, x1, y1) in pixels, x1 and y1 exclusive."""

    color: str
    shape: str
    box: tuple[int, int, int, int]
    place: str  # the quarter of the image that holds the shape

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


class Scene(NamedTuple):
    """An image with its items, and `QUESTIONS_PER_KIND` questions of each kind."""

    image: PIL.Image.Image
    items: list[Item]
    questions: list[dict]  # with kind, question, answer, and as region the box of the shape, None if it is absent


def draw_scene(split: str, number: int, seed: int = 0, grid: int = 4) -> Scene:
    """Draw scene `number` of a split, of `grid` x `grid` cells. Another `seed` gives other scenes."""
    rng = random.Random(f"busy {split} {seed} {number}")
    side = grid * CELL_SIZE
    image = _draw_ground(side, rng)
    draw = PIL.ImageDraw.Draw(image)
    for _ in range(rng.randint(2 * grid**2, 3 * grid**2)):
        _draw_clutter(draw, side, rng)
    cells = sorted(rng.sample(range(grid**2), rng.randint(*NUM_ITEMS[grid])))
    while True:
        names = [(rng.choice(list(COLORS)), rng.choice(SHAPES)) for _ in cells]
        items = [_place_item(*name, cell, grid, rng) for name, cell in zip(names, cells)]
        questions = _questions(items, grid, rng)
        if grid < 4 or len(questions) == QUESTIONS_PER_KIND * len(KINDS):
            break
    for item in items:
        _draw_item(draw, item, rng)
    return Scene(image, items, questions)


def busy_records(task: str, split: str, num_scenes: int, grid: int = 4, seed: int = 0) -> Iterator[dict]:
    """
    Draw scenes with their texts, as records in the columns that `load_task_dataset` reads.

    - `"vqa"`: `QUESTIONS_PER_KIND` questions of each kind; the presence of a color and a form once with "yes" and once
      with "no". `region`: the box of the shape; None if it is absent.
    - `"captions"`: two captions of each scene, each with color, form and quarter of all shapes in random order.
    - `"grounding"`: an expression for each shape that is unique by color, form or both.
    - `"nlvr2"`: `STATEMENTS_PER_PAIR` statements about two scenes ("only one image has a red circle"), as often true
      as false. A scene without a red circle has something red or a circle.

    Args:
        task (`str`): `"vqa"`, `"captions"`, `"grounding"` or `"nlvr2"`.
        split (`str`): `"train"`, `"validation"` or `"test"`.
        num_scenes (`int`): Number of scenes; for `"nlvr2"` of pairs. The first scenes do not depend on it.
        grid (`int`, *optional*, defaults to 4): Cells per side, 1 to 4. Scenes of fewer cells are easier and may lack
            questions of a kind; up to 2 x 2 have none for places. Statements need 2.
        seed (`int`, *optional*, defaults to 0)
    """
    if task == "nlvr2":
        yield from _statement_records(split, num_scenes, grid, seed)
        return
    for number in range(num_scenes):
        scene = draw_scene(split, number, seed, grid)
        shared = {"image": _encoded(scene.image), "image_id": f"{split} scene {number + 1}"}
        rng = random.Random(f"texts {split} {seed} {number}")
        if task == "captions":
            yield {**shared, "captions": [_caption(scene, grid, rng) for _ in range(2)]}
        elif task == "vqa":
            yield from ({**shared, **question} for question in scene.questions)
        else:
            yield from ({**shared, **expression} for expression in _expressions(scene, rng))


def _encoded(image: PIL.Image.Image) -> dict:
    """Return an image as PNG in the form that `datasets.Image` takes."""
    png = io.BytesIO()
    image.save(png, "PNG", compress_level=1)
    return {"bytes": png.getvalue(), "path": None}


def _statement_records(split: str, num_pairs: int, grid: int, seed: int) -> Iterator[dict]:
    numbers = count()
    for pair in range(num_pairs):
        rng = random.Random(f"texts {split} {seed} {pair}")
        while True:
            drawn = [next(numbers), next(numbers)]
            scenes = [draw_scene(split, number, seed, grid) for number in drawn]
            left, right = (
                {True: {item.name for item in scene.items}, False: _absent(scene.items)} for scene in scenes
            )
            named = {(a, b): sorted(left[a] & right[b]) for a in left for b in right}
            if all(named.values()):
                break
        shared = {
            "images": [_encoded(scene.image) for scene in scenes],
            "image_ids": [f"{split} scene {number + 1}" for number in drawn],
        }
        for number in range(STATEMENTS_PER_PAIR):
            statement, (if_true, if_false) = rng.choice(list(STATEMENTS.items()))
            label = number % 2 == 0
            name = rng.choice(named[rng.choice(if_true if label else if_false)])
            yield {**shared, "statement": statement.format(f"a {name}"), "label": label}


def _absent(items: list[Item]) -> set[str]:
    """Return the names of absent shapes that have the color or the form of one in the scene."""
    colors, shapes = {item.color for item in items}, {item.shape for item in items}
    near = {f"{color} {shape}" for color in COLORS for shape in SHAPES if color in colors or shape in shapes}
    return near - {item.name for item in items}


def _caption(scene: Scene, grid: int, rng: random.Random) -> str:
    items = rng.sample(scene.items, len(scene.items))
    if grid == 1:  # the only cell is no place
        return f"a {items[0].name}"
    return ", ".join(f"a {item.name} at the {item.place}" for item in items)


def _expressions(scene: Scene, rng: random.Random) -> Iterator[dict]:
    names = [(f"{item.color} one", item.shape, item.name) for item in scene.items]
    times = Counter(name for group in names for name in group)
    for group, item in zip(names, scene.items, strict=True):
        if unique := [name for name in group if times[name] == 1]:
            yield {"expression": f"the {rng.choice(unique)}", "box": list(item.box)}


def _questions(items: list[Item], grid: int, rng: random.Random) -> list[dict]:
    """Return `QUESTIONS_PER_KIND` questions of each kind, or fewer if the items do not allow them."""
    times = Counter(value for item in items for value in (item.color, item.shape, item.name))
    pools: dict[str, list[tuple]] = {kind: [] for kind in KINDS}
    for item in items:
        by_color, by_shape, by_name = (times[value] == 1 for value in (item.color, item.shape, item.name))
        if by_shape:
            pools["color"].append((f"what color is the {item.shape}?", item.color, list(item.box)))
        if by_color:
            pools["shape"].append((f"what shape is the {item.color} one?", item.shape, list(item.box)))
        names = [f"the {item.color} one"] * by_color + [f"the {item.shape}"] * by_shape
        if names and grid > 2:  # in small scenes, [CLS] alone tells which quarters hold shapes
            pools["place"].append((f"where is {rng.choice(names)}?", item.place, list(item.box)))
        if by_name:
            pools["presence"].append((f"is there a {item.name}?", "yes", list(item.box)))
    # An absent item combines a color and a shape of the scene, so that neither alone gives the answer.
    absent = sorted({f"{a.color} {b.shape}" for a in items for b in items} - {item.name for item in items})
    pools["absence"] = [(f"is there a {name}?", "no", None) for name in absent]
    questions = []
    for pool, texts in pools.items():
        kind, number = ("presence", 1) if pool in ("presence", "absence") else (pool, QUESTIONS_PER_KIND)
        for question, answer, region in rng.sample(texts, min(number, len(texts))):
            questions.append({"kind": kind, "question": question, "answer": answer, "region": region})
    return questions


def _draw_ground(side: int, rng: random.Random) -> PIL.Image.Image:
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


def _draw_clutter(draw: PIL.ImageDraw.ImageDraw, side: int, rng: random.Random):
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


def _draw_item(draw: PIL.ImageDraw.ImageDraw, item: Item, rng: random.Random):
    x0, y0, size = item.box[0], item.box[1], item.box[2] - item.box[0]
    fill, edge = _shade(COLORS[item.color], rng), _shade((25, 25, 25), rng)
    x1, y1, middle_x, middle_y = x0 + size - 1, y0 + size - 1, x0 + (size - 1) / 2, y0 + (size - 1) / 2
    if item.shape == "circle":
        draw.ellipse([x0, y0, x1, y1], fill=fill, outline=edge)
    elif item.shape == "square":
        draw.rectangle([x0 + 1, y0 + 1, x1 - 1, y1 - 1], fill=fill, outline=edge)
    else:
        corners = POLYGONS[item.shape]
        points = [(middle_x + x * (size - 1) / 2, middle_y + y * (size - 1) / 2) for x, y in corners]
        draw.polygon(points, fill=fill, outline=edge)
    mark = rng.choice(list(MARKS))
    x, y = round(middle_x), round(middle_y + (2 if item.shape == "triangle" else 0))
    box = [x + MARKS[mark][0], y + MARKS[mark][1], x + MARKS[mark][2], y + MARKS[mark][3]]
    if mark == "ring":
        draw.ellipse(box, outline="white", width=1)
    else:
        draw.rectangle(box, fill="white")
