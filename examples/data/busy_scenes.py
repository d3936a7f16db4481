"""Busy scenes: marked shapes on a textured background with clutter in the same colors, and texts about one shape each.

Colors and forms repeat: a question about a mark names a shape by both, and neither alone finds it. Shapes do not
follow the grid of the patches. The splits use different seeds. Two wordings of each question are kept for the test
split.
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
# White marks inside the shapes, as boxes around the center.
MARKS = {"dot": (-2, -2, 2, 2), "bar": (-1, -4, 1, 4), "dash": (-4, -1, 4, 1), "ring": (-4, -4, 4, 4)}
# Corners of polygons in the square from (-1, -1) to (1, 1)
_CROSS = (-0.4, 0.4, 0.4, 1, 1, 0.4, 0.4, -0.4, -0.4, -1, -1, -0.4)
_RAYS = [(math.pi * (corner / 5 - 0.5), (1.0, 0.5)[corner % 2]) for corner in range(10)]
POLYGONS: dict[str, list[tuple[float, float]]] = {
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "cross": list(zip(_CROSS, _CROSS[-3:] + _CROSS[:-3])),
    "star": [(math.cos(angle) * length, math.sin(angle) * length) for angle, length in _RAYS],
}
KINDS = ("color", "shape", "mark", "presence")
# Wordings of the questions: those of all splits, and those of the test split alone, of words that the others have.
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "color": (
        (
            "what color is the {}?",
            "what color is the {}",
            "which color does the {} have?",
            "what color has the {}?",
            "tell me the color of the {}",
            "the {} has which color?",
        ),
        ("what is the color of the {}?", "which color is the {}"),
    ),
    "shape": (
        (
            "what shape is the {} one?",
            "what shape is the {} one",
            "which shape does the {} one have?",
            "what shape has the {} one?",
            "tell me the shape of the {} one",
            "the {} one has which shape?",
        ),
        ("what is the shape of the {} one?", "which shape is the {} one"),
    ),
    "mark": (
        (
            "what mark is on the {}?",
            "what mark is on the {}",
            "which mark does the {} have?",
            "what mark has the {}?",
            "tell me the mark of the {}",
            "the {} has which mark?",
        ),
        ("what is the mark on the {}?", "which mark is on the {}"),
    ),
    "presence": (
        (
            "is there a {}?",
            "is there a {}",
            "do you see a {}?",
            "does the picture have a {}?",
            "tell me if there is a {}",
            "is a {} in the picture?",
        ),
        ("is there a {} in the picture?", "do you see a {}"),
    ),
}

CELL_SIZE = 24  # pixels; a cell holds at most one shape
NUM_ITEMS = {1: (1, 1), 2: (2, 4), 3: (6, 7), 4: (6, 8)}  # fewest and most shapes by the number of cells per side
QUESTIONS_PER_KIND = 2
STATEMENTS_PER_PAIR = 8

# Where a statement is true: whether the left and the right image have what it names.
STATEMENTS = {
    "both images have {}": [(True, True)],
    "the left image has {}": [(True, True), (True, False)],
    "the right image has {}": [(True, True), (False, True)],
    "only one image has {}": [(True, False), (False, True)],
    "both images have {} or neither has": [(True, True), (False, False)],
}


class Item(NamedTuple):
    """One shape of a scene. `box` is (x0, y0, x1, y1) in pixels, x1 and y1 exclusive."""

    color: str
    shape: str
    mark: str
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


class Scene(NamedTuple):
    """An image with its items, and `QUESTIONS_PER_KIND` questions of each kind."""

    image: PIL.Image.Image
    items: list[Item]
    # Each with kind, question, answer, wording ("known", or "new" for those of the test split alone), and as region
    # the box of the shape, None if it is absent.
    questions: list[dict]


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
        items = [_place_item(*name, cell, grid, rng) for name, cell in zip(_names(len(cells), rng), cells)]
        questions = _questions(items, split, grid, rng)
        if grid < 3 or len(questions) == QUESTIONS_PER_KIND * len(KINDS):
            break
    for item in items:
        _draw_item(draw, item, rng)
    return Scene(image, items, questions)


def busy_records(task: str, split: str, num_scenes: int, grid: int = 4, seed: int = 0) -> Iterator[dict]:
    """
    Draw scenes with their texts, as records in the columns that `load_task_dataset` reads.

    - `"vqa"`: `QUESTIONS_PER_KIND` questions of each kind; the presence of a color and a form once with "yes" and once
      with "no". `region`: the box of the shape; None if it is absent.
    - `"captions"`: two captions of each scene, each with color, form and mark of all shapes in random order.
    - `"grounding"`: an expression for each shape that is unique by color, form or both.
    - `"nlvr2"`: `STATEMENTS_PER_PAIR` statements about two scenes ("only one image has a red circle"), as often true
      as false. A scene without a red circle has something red or a circle.

    Args:
        task (`str`): `"vqa"`, `"captions"`, `"grounding"` or `"nlvr2"`.
        split (`str`): `"train"`, `"validation"` or `"test"`.
        num_scenes (`int`): Number of scenes; for `"nlvr2"` of pairs. The first scenes do not depend on it.
        grid (`int`, *optional*, defaults to 4): Cells per side, 1 to 4. Scenes of up to 2 x 2 cells may lack
            questions of a kind. Statements need 2.
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
            yield {**shared, "captions": [_caption(scene, rng) for _ in range(2)]}
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
            statement, if_true = rng.choice(list(STATEMENTS.items()))
            label = number % 2 == 0
            name = rng.choice(named[rng.choice([where for where in named if (where in if_true) == label])])
            yield {**shared, "statement": statement.format(f"a {name}"), "label": label}


def _absent(items: list[Item]) -> set[str]:
    """Return the names of absent shapes that have the color or the form of one in the scene."""
    colors, shapes = {item.color for item in items}, {item.shape for item in items}
    near = {f"{color} {shape}" for color in COLORS for shape in SHAPES if color in colors or shape in shapes}
    return near - {item.name for item in items}


def _caption(scene: Scene, rng: random.Random) -> str:
    return ", ".join(f"a {item.name} with a {item.mark}" for item in rng.sample(scene.items, len(scene.items)))


def _expressions(scene: Scene, rng: random.Random) -> Iterator[dict]:
    names = [(f"{item.color} one", item.shape, item.name) for item in scene.items]
    times = Counter(name for group in names for name in group)
    for group, item in zip(names, scene.items, strict=True):
        if unique := [name for name in group if times[name] == 1]:
            yield {"expression": f"the {rng.choice(unique)}", "box": list(item.box)}


def _names(number: int, rng: random.Random) -> list[tuple[str, str]]:
    """
    Return colors and forms of shapes, in random order. With six or more, two colors and two forms occur on several
    shapes, in three of their four combinations; two colors and two forms occur once, if no further shape has them.
    """
    (a, b, c, d), (x, y, z, w) = rng.sample(list(COLORS), 4), rng.sample(SHAPES, 4)
    names = [(a, x), (a, y), (b, x), (b, z), (c, y), (d, w)] if number >= 6 else []
    names += [(rng.choice(list(COLORS)), rng.choice(SHAPES)) for _ in range(number - len(names))]
    return rng.sample(names, number)


def _questions(items: list[Item], split: str, grid: int, rng: random.Random) -> list[dict]:
    """
    Return `QUESTIONS_PER_KIND` questions of each kind, or fewer if the items do not allow them; in the test split,
    half of them in new wordings. Where a color and a form are named, others share each of them, so that neither tells
    (but in scenes of up to 2 x 2 cells).
    """
    least = 2 if grid > 2 else 1
    times = Counter(value for item in items for value in (item.color, item.shape, item.name))
    pools: dict[str, list[tuple]] = {kind: [] for kind in ("color", "shape", "mark", "presence", "absence")}
    for item in items:
        if times[item.shape] == 1:
            pools["color"].append((item.shape, item.color, list(item.box)))
        if times[item.color] == 1:
            pools["shape"].append((item.color, item.shape, list(item.box)))
        if times[item.name] == 1 and times[item.color] >= least and times[item.shape] >= least:
            pools["mark"].append((item.name, item.mark, list(item.box)))
            pools["presence"].append((item.name, "yes", list(item.box)))
    repeated = [{value for value in values if times[value] >= least} for values in (COLORS, SHAPES)]
    absent = {f"{color} {shape}" for color in repeated[0] for shape in repeated[1]} - times.keys()
    pools["absence"] = [(name, "no", None) for name in sorted(absent)]
    questions, first = [], rng.randrange(2)
    for pool, texts in pools.items():
        kind, number = ("presence", 1) if pool in ("presence", "absence") else (pool, QUESTIONS_PER_KIND)
        for name, answer, region in rng.sample(texts, min(number, len(texts))):
            is_new = split == "test" and len(questions) % 2 == first
            question = rng.choice(WORDINGS[kind][is_new]).format(name)
            row = {"kind": kind, "question": question, "answer": answer, "region": region}
            questions.append({**row, "wording": "new" if is_new else "known"})
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
    return Item(color, shape, rng.choice(list(MARKS)), (x0, y0, x0 + size, y0 + size))


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
    x, y = round(middle_x), round(middle_y + (2 if item.shape == "triangle" else 0))
    box = [x + MARKS[item.mark][0], y + MARKS[item.mark][1], x + MARKS[item.mark][2], y + MARKS[item.mark][3]]
    if item.mark == "ring":
        draw.ellipse(box, outline="white", width=2)
    else:
        draw.rectangle(box, fill="white")
