"""Bundled synthetic data: easy-VQA, which the PyPI package easy-vqa holds, and composed scenes of its images.

The records are made in memory in seconds, without network or cache, with the columns that `load_task_dataset` reads.
"""

import functools
import io
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import PIL.Image
import PIL.ImageChops


EASY_VQA_COLORS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
EASY_VQA_SHAPES = {"circle", "rectangle", "triangle"}

# Default number of tiles along each side of a scene.
DEFAULT_GRID = {"vqa": 2, "captions": 2, "nlvr2": 1, "grounding": 2}
# In larger scenes hardly any color or shape is unique, which leaves few questions.
MAX_GRID = 8
TILE_SIZE = 64


SPLITS = ("train", "validation", "test")
# Training images of easy-VQA with this remainder of their number are the validation split.
VALIDATION_IMAGES = (10, 9)


# easy-VQA


class _EasyVqaSplit(NamedTuple):
    questions: list[str]
    answers: list[str]
    image_ids: list[int]
    image_paths: dict[int, str]


def _read_easy_vqa(split: str) -> _EasyVqaSplit:
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError(
            "The data set easy-VQA needs the package easy-vqa, which is not installed: `pip install easy-vqa`."
        ) from error
    if split == "test":
        return _EasyVqaSplit._make([*easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()])
    divisor, rest = VALIDATION_IMAGES

    def is_in(image_id: int) -> bool:
        return (image_id % divisor == rest) == (split == "validation")

    rows = [row for row in zip(*easy_vqa.get_train_questions(), strict=True) if is_in(row[2])]
    paths = {image_id: path for image_id, path in easy_vqa.get_train_image_paths().items() if is_in(image_id)}
    questions, answers, image_ids = map(list, zip(*rows))
    return _EasyVqaSplit(questions, answers, image_ids, paths)


def easy_vqa_records(split: str) -> Iterator[dict]:
    """
    Yield the questions of easy-VQA.

    Args:
        split (`str`): `"test"`, the official split; `"validation"`, a tenth of the official training images with their
            questions; or `"train"`, the remaining training images.

    Yields:
        `dict`: `image` (a path), `image_id`, `question`, `answer` and `region`, the box (x0, y0, x1, y1) of the shape
        in pixels, x1 and y1 exclusive.

    Raises:
        `ImportError`: The package easy-vqa is missing.
    """
    data = _read_easy_vqa(split)
    box_of = functools.cache(lambda image_id: shape_box(PIL.Image.open(data.image_paths[image_id]).convert("RGB")))
    for question, answer, image_id in zip(data.questions, data.answers, data.image_ids, strict=True):
        image = {"image": data.image_paths[image_id], "image_id": f"{split} {image_id}"}
        yield {**image, "question": question, "answer": answer, "region": list(box_of(image_id))}


def easy_vqa_attributes(split: str) -> dict[int, tuple[str, str]]:
    """
    Infer color and shape of the images of easy-VQA from their questions and answers.

    A yes or no question with "no" or "not" is read as its opposite. About one image in ten is left out, because its
    questions do not determine both color and shape.

    Args:
        split (`str`): `"train"`, `"validation"` or `"test"`.

    Returns:
        `dict[int, tuple[str, str]]`: Color and shape by image number, in ascending order.

    Raises:
        `ValueError`: The questions about an image contradict each other.
    """
    data = _read_easy_vqa(split)
    left: dict[int, tuple[set[str], ...]] = dict.fromkeys(sorted(data.image_paths), (EASY_VQA_COLORS, EASY_VQA_SHAPES))
    for question, answer, image_id in zip(data.questions, data.answers, data.image_ids, strict=True):
        words = set(re.findall(r"\w+", question))
        denied = (answer == "no") != bool(words & {"no", "not"})
        left[image_id] = tuple(_narrow(names, words | {answer}, denied) for names in left[image_id])
        if not all(left[image_id]):
            raise ValueError(
                f"The questions about the {split} image {image_id} of easy-VQA contradict each other, see "
                f"{question!r} with the answer {answer!r}. Reinstall the package easy-vqa."
            )
    return {
        image_id: (min(colors), min(shapes))
        for image_id, (colors, shapes) in left.items()
        if len(colors) == len(shapes) == 1
    }


def _narrow(names: set[str], words: set[str], denied: bool) -> set[str]:
    if not names & words:
        return names
    return names - words if denied else names & words


# Scenes


@dataclass(frozen=True, eq=False)
class Tile:
    """An image of easy-VQA, 64 x 64 pixels, with its color and shape."""

    color: str
    shape: str
    image: PIL.Image.Image

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @functools.cached_property
    def box(self) -> tuple[int, int, int, int]:
        return shape_box(self.image)


def encoded(image: PIL.Image.Image) -> dict:
    """Return an image as PNG in the form that `datasets.Image` takes."""
    png = io.BytesIO()
    image.save(png, "PNG", compress_level=1)
    return {"bytes": png.getvalue(), "path": None}


@dataclass(frozen=True)
class _Scenes:
    """Generator of scenes: the tiles of a split, the grid, and the random state."""

    split: str
    tiles: list[Tile]
    grid: int
    rng: random.Random

    @functools.cached_property
    def tiles_by_name(self) -> dict[tuple[str, str], list[Tile]]:
        groups = defaultdict(list)
        for tile in self.tiles:
            groups[tile.color, tile.shape].append(tile)
        return dict(sorted(groups.items()))

    def draw(self) -> list[Tile]:
        return self.rng.sample(self.tiles, self.grid * self.grid)

    def paste(self, tiles: list[Tile]) -> dict:
        """Return the scene of tiles, row by row, as `encoded`."""
        side = self.grid * TILE_SIZE
        scene = PIL.Image.new("RGB", (side, side))
        for cell, tile in enumerate(tiles):
            scene.paste(tile.image, cell_origin(cell, self.grid))
        return encoded(scene)


def scene_records(task: str, split: str, num_scenes: int, grid: int | None = None, seed: int = 0) -> Iterator[dict]:
    """
    Compose scenes of `grid` x `grid` images of easy-VQA, with texts that need a region of the image.

    The first scenes do not depend on `num_scenes`. Only images with a known color and shape are used, see
    `easy_vqa_attributes`. By task:

    - `"vqa"`: a question for each color and each shape that only one tile has ("what shape is the red shape?", "what
      color is the circle?"), and a pair about presence with the answers "yes" and "no" ("is there a red circle?"). An
      absent tile has a color of the scene, so that color and shape must be seen together. `region`: the box (x0, y0,
      x1, y1) of the tile in pixels, x1 and y1 exclusive; None for an absent tile. `kind`: shape, color or presence.
    - `"captions"`: three captions of each scene with color, shape and position of each tile: tile by tile in random
      order, row by row, and column by column. Scenes of a split are distinct, so that each caption fits one scene.
    - `"nlvr2"`: a statement about two scenes ("only one image has a red circle"), with a pair for which it is true and
      a pair for which it is false, so that the text alone does not give the label. An image without a red circle has a
      red shape or a circle.
    - `"grounding"`: an expression for each tile that is unique by color, shape or both ("the red shape", "the circle",
      "the red circle"), and the position of one tile of each scene ("the shape at the top left"). `box`: (x0, y0, x1,
      y1) of the shape in pixels, x1 and y1 exclusive.

    Args:
        task (`str`): `"vqa"`, `"captions"`, `"nlvr2"` or `"grounding"`.
        split (`str`): Part of easy-VQA with the tiles: `"train"`, `"validation"` or `"test"`. Splits have disjoint
            tiles and different seeds.
        num_scenes (`int`): Number of scenes, at least 1; for `"nlvr2"` the number of statements, with 4 scenes each.
        grid (`int`, *optional*): Tiles of 64 x 64 pixels along each side, 1 to 8. Default: `DEFAULT_GRID[task]`. With
            4, a region is at most a sixteenth of the image.
        seed (`int`, *optional*, defaults to 0)

    Returns:
        `Iterator[dict]`: Records in the columns that `load_task_dataset` reads. For `grid=2`, about six per scene for
        `"vqa"`, five for `"grounding"`; one for `"captions"`, two per statement for `"nlvr2"`. Records of one scene
        have equal `image_id`.

    Raises:
        `ValueError`: `grid` or `num_scenes` is out of range.
    """
    check_scenes(task, split, num_scenes, grid)
    grid = DEFAULT_GRID[task] if grid is None else grid
    return _RECORDS[task](_Scenes(split, read_tiles(split), grid, random.Random(f"{seed} {split}")), num_scenes)


def check_scenes(task: str, split: str, num_scenes: int, grid: int | None):
    """Raise a `ValueError` if `scene_records` cannot make these scenes."""
    grid = DEFAULT_GRID[task] if grid is None else grid
    if not 1 <= grid <= MAX_GRID:
        raise ValueError(f"grid is {grid}: choose 1 to {MAX_GRID} tiles along each side of a scene.")
    if num_scenes < 1:
        raise ValueError(f"The number of {split} scenes is {num_scenes}: choose at least 1.")
    different = (len(EASY_VQA_COLORS) * len(EASY_VQA_SHAPES)) ** (grid * grid)
    if task == "captions" and num_scenes > different // 2:
        raise ValueError(
            f"{num_scenes} {split} scenes of {grid} x {grid} tiles cannot have distinct captions, as only {different} "
            f"exist. Choose a larger grid, or at most {different // 2} scenes."
        )


def read_tiles(split: str) -> list[Tile]:
    """Return the images of `easy_vqa_attributes(split)`, in that order."""
    paths = _read_easy_vqa(split).image_paths
    attributes = easy_vqa_attributes(split)
    return [Tile(*names, PIL.Image.open(paths[image_id]).convert("RGB")) for image_id, names in attributes.items()]


def cell_origin(cell: int, grid: int) -> tuple[int, int]:
    """Return the left and upper edge of a cell in pixels. Cells are numbered row by row from 0."""
    return cell % grid * TILE_SIZE, cell // grid * TILE_SIZE


def _place(cell: int, grid: int) -> str:
    row, column = divmod(cell, grid)
    if grid == 2:
        return f"at the {('top', 'bottom')[row]} {('left', 'right')[column]}"
    return f"in row {row + 1} column {column + 1}"


def _listed(items: Sequence[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


# Questions


def _vqa_records(scenes: _Scenes, num_scenes: int) -> Iterator[dict]:
    for number in range(1, num_scenes + 1):
        tiles = scenes.draw()
        shared = {"image": scenes.paste(tiles), "image_id": f"{scenes.split} scene {number}"}
        for kind, question, answer, cell in _questions(tiles, scenes.rng):
            x0, y0 = (0, 0) if cell is None else cell_origin(cell, scenes.grid)
            box = None if cell is None else [x0, y0, x0 + TILE_SIZE, y0 + TILE_SIZE]
            yield {**shared, "kind": kind, "question": question, "answer": answer, "region": box}


def _questions(tiles: list[Tile], rng: random.Random) -> Iterator[tuple[str, str, str, int | None]]:
    """Yield kind, question, answer and target cell."""
    times = Counter(name for tile in tiles for name in (tile.color, tile.shape, tile.name))
    for cell, tile in enumerate(tiles):
        if times[tile.color] == 1:
            yield "shape", f"what shape is the {tile.color} shape?", tile.shape, cell
        if times[tile.shape] == 1:
            yield "color", f"what color is the {tile.shape}?", tile.color, cell
    present = [cell for cell, tile in enumerate(tiles) if times[tile.name] == 1]
    possible = {f"{tile.color} {shape}" for tile in tiles for shape in EASY_VQA_SHAPES}
    absent = sorted(possible - {tile.name for tile in tiles})
    if present and absent:
        cell = rng.choice(present)
        yield "presence", f"is there a {tiles[cell].name}?", "yes", cell
        yield "presence", f"is there a {rng.choice(absent)}?", "no", None


# Captions


def _caption_records(scenes: _Scenes, num_scenes: int) -> Iterator[dict]:
    seen = set()
    while len(seen) < num_scenes:
        tiles = scenes.draw()
        names = tuple(f"a {tile.name}" for tile in tiles)
        if names in seen:
            continue
        seen.add(names)
        image_id = f"{scenes.split} scene {len(seen)}"
        captions = [_by_tile(names, scenes), _by_row(names, scenes.grid), _by_column(names, scenes.grid)]
        yield {"image": scenes.paste(tiles), "image_id": image_id, "captions": captions}


def _by_tile(names: tuple[str, ...], scenes: _Scenes) -> str:
    cells = scenes.rng.sample(range(len(names)), len(names))
    return ", ".join(f"{names[cell]} {_place(cell, scenes.grid)}" for cell in cells)


def _by_row(names: tuple[str, ...], grid: int) -> str:
    labels = ("the top row", "the bottom row") if grid == 2 else [f"row {row + 1}" for row in range(grid)]
    rows = [_listed(names[row * grid : (row + 1) * grid]) for row in range(grid)]
    return ", ".join(f"{label} has {row}" for label, row in zip(labels, rows, strict=True))


def _by_column(names: tuple[str, ...], grid: int) -> str:
    labels = ("the left column", "the right column") if grid == 2 else [f"column {i + 1}" for i in range(grid)]
    columns = [_listed(names[column::grid]) for column in range(grid)]
    return ", ".join(f"{label} has {column}" for label, column in zip(labels, columns, strict=True))


# Statements about two images

# Whether the left and the right image contain the named object, for true and for false statements, equally likely. A
# model that sees one image can reach 75% on the first three kinds and 50% on the last two.
NLVR2_STATEMENTS = {
    "both images have {}": ([(True, True)], [(True, False), (False, True)]),
    "only the left image has {}": ([(True, False)], [(True, True), (False, False)]),
    "only the right image has {}": ([(False, True)], [(True, True), (False, False)]),
    "only one image has {}": ([(True, False), (False, True)], [(True, True), (False, False)]),
    "both images have {} or neither has": ([(True, True), (False, False)], [(True, False), (False, True)]),
}


def _nlvr2_records(scenes: _Scenes, num_scenes: int) -> Iterator[dict]:
    numbers = iter(range(1, 4 * num_scenes + 1))
    for _ in range(num_scenes):
        statement, (true_pairs, false_pairs) = scenes.rng.choice(list(NLVR2_STATEMENTS.items()))
        color, shape = _named(scenes.rng)
        statement = statement.format(" ".join(["a", *filter(None, [color, shape or "shape"])]))
        for label, pairs in ((True, true_pairs), (False, false_pairs)):
            pair = scenes.rng.choice(pairs)
            images = [scenes.paste(_tiles_with(color, shape, has, scenes)) for has in pair]
            image_ids = [f"{scenes.split} scene {next(numbers)}" for _ in pair]
            yield {"images": images, "image_ids": image_ids, "statement": statement, "label": label}


def _named(rng: random.Random) -> tuple[str | None, str | None]:
    """Draw a color, a shape, or both."""
    color, shape = rng.choice(sorted(EASY_VQA_COLORS)), rng.choice(sorted(EASY_VQA_SHAPES))
    return rng.choice([(color, None), (None, shape), (color, shape)])


def _tiles_with(color: str | None, shape: str | None, has: bool, scenes: _Scenes) -> list[Tile]:
    """
    Draw tiles with (`has`) or without a tile of the given color and shape. If both are given, one of the other tiles
    has the color or the shape, so that neither alone gives the answer.
    """
    rng, names = scenes.rng, list(scenes.tiles_by_name)
    fit = {name: (color in (None, name[0])) + (shape in (None, name[1])) for name in names}  # 2: a match
    first = rng.choice([name for name in names if fit[name] == (2 if has else 1)])
    others = rng.choices([name for name in names if fit[name] < 2], k=scenes.grid**2 - 1)
    tiles = [rng.choice(scenes.tiles_by_name[name]) for name in (first, *others)]
    rng.shuffle(tiles)
    return tiles


# Grounding


def _grounding_records(scenes: _Scenes, num_scenes: int) -> Iterator[dict]:
    for number in range(1, num_scenes + 1):
        tiles = scenes.draw()
        shared = {"image": scenes.paste(tiles), "image_id": f"{scenes.split} scene {number}"}
        for expression, cell in _expressions(tiles, scenes):
            yield {**shared, "expression": expression, "box": _moved(tiles[cell].box, cell, scenes.grid)}


def _expressions(tiles: list[Tile], scenes: _Scenes) -> Iterator[tuple[str, int]]:
    names = [(f"{tile.color} shape", tile.shape, tile.name) for tile in tiles]
    times = Counter(name for tile in names for name in tile)
    for cell, tile in enumerate(names):
        if unique := [name for name in tile if times[name] == 1]:
            yield f"the {scenes.rng.choice(unique)}", cell
    cell = scenes.rng.randrange(len(tiles))
    yield f"the shape {_place(cell, scenes.grid)}", cell


def _moved(box: tuple[int, int, int, int], cell: int, grid: int) -> list[int]:
    x, y = cell_origin(cell, grid)
    return [x + box[0], y + box[1], x + box[2], y + box[3]]


def shape_box(tile: PIL.Image.Image) -> tuple[int, int, int, int]:
    """
    Return the box (x0, y0, x1, y1), x1 and y1 exclusive, of the shape on a tile's plain background, the most common
    color. Mixed pixels at the edge count if at least half of their color is the shape's.
    """
    _, background = max(tile.getcolors(tile.width * tile.height))
    difference = PIL.ImageChops.difference(tile, PIL.Image.new(tile.mode, tile.size, background))
    distance = functools.reduce(PIL.ImageChops.lighter, difference.split())
    _, most = distance.getextrema()
    return distance.point(lambda value: 255 * (2 * value >= most)).getbbox()


_RECORDS: dict[str, Callable[[_Scenes, int], Iterator[dict]]] = {
    "vqa": _vqa_records,
    "captions": _caption_records,
    "nlvr2": _nlvr2_records,
    "grounding": _grounding_records,
}
