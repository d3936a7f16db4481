"""Busy scenes: marked shapes on a textured background with clutter in the same colors, and texts about one shape each.

Colors and forms repeat: a question about a mark names a shape by both, and neither alone finds it. Shapes do not
follow the grid of the patches. The splits use different seeds. Two wordings of each question are kept for the test
split.
"""

import io
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator
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

    @property
    def descriptions(self) -> tuple[str, str, str]:
        """What an expression can call it, where no other shape is called so."""
        return f"{self.color} one", self.shape, self.name


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
        items = []
        for (color, shape), cell in zip(_names(len(cells), rng), cells):
            items.append(_place_item(color, shape, cell, grid, rng))
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
            for question in scene.questions:
                yield {**shared, **question}
        else:
            for expression in _expressions(scene, rng):
                yield {**shared, **expression}


def _encoded(image: PIL.Image.Image) -> dict:
    """Return an image as PNG in the form that `datasets.Image` takes."""
    png = io.BytesIO()
    image.save(png, "PNG", compress_level=1)
    return {"bytes": png.getvalue(), "path": None}


def _statement_records(split: str, num_pairs: int, grid: int, seed: int) -> Iterator[dict]:
    numbers = itertools.count()
    for pair in range(num_pairs):
        rng = random.Random(f"texts {split} {seed} {pair}")
        while True:
            drawn = [next(numbers), next(numbers)]
            scenes = [draw_scene(split, number, seed, grid) for number in drawn]
            names = _names_by_place(*scenes)
            if all(names.values()):
                break
        shared = {
            "images": [_encoded(scene.image) for scene in scenes],
            "image_ids": [f"{split} scene {number + 1}" for number in drawn],
        }
        for number in range(STATEMENTS_PER_PAIR):
            statement, if_true = rng.choice(list(STATEMENTS.items()))
            label = number % 2 == 0
            places = [place for place in names if (place in if_true) == label]
            name = rng.choice(names[rng.choice(places)])
            yield {**shared, "statement": statement.format(f"a {name}"), "label": label}


def _names_by_place(left: Scene, right: Scene) -> dict[tuple[bool, bool], list[str]]:
    """Return the names that both scenes have, the left one, the right one, and neither, as in `STATEMENTS`."""
    in_left = {item.name for item in left.items}
    in_right = {item.name for item in right.items}
    not_in_left = _absent(left.items)
    not_in_right = _absent(right.items)
    return {
        (True, True): sorted(in_left & in_right),
        (True, False): sorted(in_left & not_in_right),
        (False, True): sorted(not_in_left & in_right),
        (False, False): sorted(not_in_left & not_in_right),
    }


def _absent(items: list[Item]) -> set[str]:
    """Return the names of absent shapes that have the color or the form of one in the scene."""
    colors = {item.color for item in items}
    shapes = {item.shape for item in items}
    near = set()
    for color, shape in itertools.product(COLORS, SHAPES):
        if color in colors or shape in shapes:
            near.add(f"{color} {shape}")
    return near - {item.name for item in items}


def _caption(scene: Scene, rng: random.Random) -> str:
    shuffled = rng.sample(scene.items, len(scene.items))
    return ", ".join(f"a {item.name} with a {item.mark}" for item in shuffled)


def _expressions(scene: Scene, rng: random.Random) -> Iterator[dict]:
    times = Counter(name for item in scene.items for name in item.descriptions)
    for item in scene.items:
        unique = [name for name in item.descriptions if times[name] == 1]
        if unique:
            yield {"expression": f"the {rng.choice(unique)}", "box": list(item.box)}


def _names(number: int, rng: random.Random) -> list[tuple[str, str]]:
    """
    Return colors and forms of shapes, in random order. With six or more, two colors and two forms occur on several
    shapes, in three of their four combinations; two colors and two forms occur once, if no further shape has them.
    """
    a, b, c, d = rng.sample(list(COLORS), 4)
    x, y, z, w = rng.sample(SHAPES, 4)
    names: list[tuple[str, str]] = []
    if number >= 6:
        names = [(a, x), (a, y), (b, x), (b, z), (c, y), (d, w)]
    while len(names) < number:
        color = rng.choice(list(COLORS))
        shape = rng.choice(SHAPES)
        names.append((color, shape))
    return rng.sample(names, number)


def _questions(items: list[Item], split: str, grid: int, rng: random.Random) -> list[dict]:
    """
    Return `QUESTIONS_PER_KIND` questions of each kind, or fewer if the items do not allow them; in the test split,
    half of them in new wordings. Where a color and a form are named, others share each of them, so that neither tells
    (but in scenes of up to 2 x 2 cells, from which a new model learns presence).
    """
    questions = []
    first_new = rng.randrange(2)
    for kind, number, choices in _askable(items, least=2 if grid > 2 else 1):
        for name, answer, region in rng.sample(choices, min(number, len(choices))):
            is_new = split == "test" and len(questions) % 2 == first_new
            known_wordings, new_wordings = WORDINGS[kind]
            wording = rng.choice(new_wordings if is_new else known_wordings)
            questions.append(
                {
                    "kind": kind,
                    "question": wording.format(name),
                    "answer": answer,
                    "region": region,
                    "wording": "new" if is_new else "known",
                }
            )
    return questions


def _askable(items: list[Item], least: int) -> list[tuple[str, int, list[tuple]]]:
    """
    Return kinds of questions, how many of each to ask, and what they can be about: name, answer and region. A name of
    a color and a form is asked for if `least` shapes have each of them. With `least=1`, absent names have one of them.
    """
    times: Counter[str] = Counter()
    for item in items:
        times.update((item.color, item.shape, item.name))
    colors = []
    shapes = []
    marks = []
    present = []
    for item in items:
        box = list(item.box)
        if times[item.shape] == 1:
            colors.append((item.shape, item.color, box))
        if times[item.color] == 1:
            shapes.append((item.color, item.shape, box))
        if times[item.name] == 1 and times[item.color] >= least and times[item.shape] >= least:
            marks.append((item.name, item.mark, box))
            present.append((item.name, "yes", box))
    if least == 1:
        absent_names = _absent(items)
    else:
        repeated_colors = [color for color in COLORS if times[color] >= least]
        repeated_shapes = [shape for shape in SHAPES if times[shape] >= least]
        names = {f"{color} {shape}" for color, shape in itertools.product(repeated_colors, repeated_shapes)}
        absent_names = names - times.keys()
    absent = [(name, "no", None) for name in sorted(absent_names)]
    return [
        ("color", QUESTIONS_PER_KIND, colors),
        ("shape", QUESTIONS_PER_KIND, shapes),
        ("mark", QUESTIONS_PER_KIND, marks),
        ("presence", 1, present),
        ("presence", 1, absent),
    ]


def _draw_ground(side: int, rng: random.Random) -> PIL.Image.Image:
    """Return a textured background of `side` x `side` pixels."""
    noise = np.random.default_rng(rng.getrandbits(64))
    num_rows = rng.randint(3, 8)
    num_columns = rng.randint(3, 8)
    spots = noise.uniform(60, 190, size=(num_rows, num_columns, 3))
    spots = spots.astype(np.uint8)
    coarse = PIL.Image.fromarray(spots)
    smooth = coarse.resize((side, side), resample=PIL.Image.Resampling.BICUBIC)
    colors = np.asarray(smooth, dtype=np.float32)  # (side, side, 3)
    gray = colors.mean(axis=-1, keepdims=True)
    grain = noise.normal(0, 10, size=colors.shape)
    texture = gray * 0.5 + colors * 0.5 + grain
    texture = texture.clip(0, 255).astype(np.uint8)
    return PIL.Image.fromarray(texture)


def _shade(color: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    light = rng.randint(-18, 18)
    shaded = []
    for value in color:
        value += light + rng.randint(-8, 8)
        shaded.append(min(255, max(0, value)))
    return tuple(shaded)


def _draw_clutter(draw: PIL.ImageDraw.ImageDraw, side: int, rng: random.Random):
    """Draw a thin line, an outline or a few dots, often in the color of a shape."""
    if rng.random() < 0.6:
        base = rng.choice(list(COLORS.values()))
    else:
        base = (rng.randint(0, 255),) * 3
    color = _shade(base, rng)
    x = rng.uniform(0, side)
    y = rng.uniform(0, side)
    angle = rng.uniform(0, 2 * math.pi)
    length = rng.uniform(4, 14)
    form = rng.randrange(3)
    if form == 0:
        end_x = x + length * math.cos(angle)
        end_y = y + length * math.sin(angle)
        draw.line([(x, y), (end_x, end_y)], fill=color, width=rng.randint(1, 2))
    elif form == 1:
        start = 360 * rng.random()
        end = 360 * rng.random() + 200
        draw.arc([x, y, x + length, y + length], start=start, end=end, fill=color)
    else:
        for _ in range(4):
            dot_x = x + rng.uniform(-6, 6)
            dot_y = y + rng.uniform(-6, 6)
            width = rng.randint(1, 2)
            height = rng.randint(1, 2)
            draw.rectangle([dot_x, dot_y, dot_x + width, dot_y + height], fill=color)


def _place_item(color: str, shape: str, cell: int, grid: int, rng: random.Random) -> Item:
    row, column = divmod(cell, grid)
    size = rng.randint(17, 22)
    room = CELL_SIZE - size
    x0 = column * CELL_SIZE + rng.randint(0, room)
    y0 = row * CELL_SIZE + rng.randint(0, room)
    mark = rng.choice(list(MARKS))
    return Item(color=color, shape=shape, mark=mark, box=(x0, y0, x0 + size, y0 + size))


def _draw_item(draw: PIL.ImageDraw.ImageDraw, item: Item, rng: random.Random):
    x0, y0, x1, y1 = item.box
    last_x = x1 - 1  # Pillow's boxes include their last pixel
    last_y = y1 - 1
    radius = (last_x - x0) / 2
    middle_x = x0 + radius
    middle_y = y0 + radius
    fill = _shade(COLORS[item.color], rng)
    edge = _shade((25, 25, 25), rng)
    if item.shape == "circle":
        draw.ellipse([x0, y0, last_x, last_y], fill=fill, outline=edge)
    elif item.shape == "square":
        draw.rectangle([x0 + 1, y0 + 1, last_x - 1, last_y - 1], fill=fill, outline=edge)
    else:
        points = [(middle_x + x * radius, middle_y + y * radius) for x, y in POLYGONS[item.shape]]
        draw.polygon(points, fill=fill, outline=edge)
    x = round(middle_x)
    y = round(middle_y + (2 if item.shape == "triangle" else 0))
    left, top, right, bottom = MARKS[item.mark]
    box = [x + left, y + top, x + right, y + bottom]
    if item.mark == "ring":
        draw.ellipse(box, outline="white", width=2)
    else:
        draw.rectangle(box, fill="white")
