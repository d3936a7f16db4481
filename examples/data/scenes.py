"""easy-VQA, the data set inside the PyPI package of that name, and scenes made of its images, for every task.

All is made in memory in seconds: no network, no cache on disk. What comes out are records, as from a file: the columns
are those that `load_task_dataset` reads.
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

# Tiles along each side of a scene, by task, where nothing else is asked for.
DEFAULT_GRID = {"vqa": 2, "captions": 2, "nlvr2": 1, "grounding": 2}
# In larger scenes hardly any colour or shape is unique, so that there is next to nothing to ask.
MAX_GRID = 8
TILE_SIZE = 64


SPLITS = ("train", "validation", "test")
# Of the training images of easy-VQA, those whose number leaves this rest are the validation split.
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
            "The data set easy-VQA is in the package easy-vqa, which is not installed: `pip install easy-vqa`."
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
    Yields the questions of easy-VQA.

    Args:
        split (`str`): `"test"`, the official one; `"validation"`, a tenth of the official training images with their
            questions; or `"train"`, the others.

    Yields:
        `dict`: `image` (a path), `image_id`, `question` and `answer`; and `region`, (x0, y0, x1, y1) in pixels of
        the shape that all questions are about, x1 and y1 exclusive.

    Raises:
        `ImportError`: Where the package easy-vqa is missing.
    """
    data = _read_easy_vqa(split)
    box_of = functools.cache(lambda image_id: shape_box(PIL.Image.open(data.image_paths[image_id]).convert("RGB")))
    for question, answer, image_id in zip(data.questions, data.answers, data.image_ids, strict=True):
        image = {"image": data.image_paths[image_id], "image_id": f"{split} {image_id}"}
        yield {**image, "question": question, "answer": answer, "region": list(box_of(image_id))}


def easy_vqa_attributes(split: str) -> dict[int, tuple[str, str]]:
    """
    Recovers what the images of easy-VQA show from their own questions and answers.

    A yes or no question about "no" or "not" is read as its opposite. Of the official images, about one in ten has too
    few questions to tell both its colour and its shape: it is left out.

    Args:
        split (`str`): `"train"`, `"validation"` or `"test"`.

    Returns:
        `dict[int, tuple[str, str]]`: The colour and the shape by number of image, in ascending order.

    Raises:
        `ValueError`: Where the questions about an image contradict each other.
    """
    data = _read_easy_vqa(split)
    left: dict[int, tuple[set[str], ...]] = dict.fromkeys(sorted(data.image_paths), (EASY_VQA_COLORS, EASY_VQA_SHAPES))
    for question, answer, image_id in zip(data.questions, data.answers, data.image_ids, strict=True):
        words = set(re.findall(r"\w+", question))
        denied = (answer == "no") != bool(words & {"no", "not"})
        left[image_id] = tuple(_narrow(names, words | {answer}, denied) for names in left[image_id])
        if not all(left[image_id]):
            raise ValueError(
                f"The questions about the {split} image {image_id} of easy-VQA contradict each other, at the latest "
                f"in {question!r} with the answer {answer!r}: install the package easy-vqa anew."
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
    """An image of easy-VQA, 64 x 64 pixels, and what it shows."""

    color: str
    shape: str
    image: PIL.Image.Image

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @functools.cached_property
    def box(self) -> tuple[int, int, int, int]:
        return shape_box(self.image)


@dataclass(frozen=True)
class _Scenes:
    """What the records of a task are made from: the tiles of a split, a grid, and the source of randomness."""

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
        """The scene, encoded as `datasets.Image` takes it, tiles row by row."""
        side = self.grid * TILE_SIZE
        scene = PIL.Image.new("RGB", (side, side))
        for cell, tile in enumerate(tiles):
            scene.paste(tile.image, cell_origin(cell, self.grid))
        png = io.BytesIO()
        scene.save(png, "PNG", compress_level=1)
        return {"bytes": png.getvalue(), "path": None}


def scene_records(task: str, split: str, num_scenes: int, grid: int | None = None, seed: int = 0) -> Iterator[dict]:
    """
    Makes scenes of `grid` x `grid` images of easy-VQA, with texts that need the image, and in it the right place.

    The first scenes are the same however many are made. Images whose colour and shape easy-VQA does not tell are not
    used, see `easy_vqa_attributes`. By task:

    - `"vqa"`: a question for each colour and each shape that only one of the tiles has ("what shape is the red
      shape?", "what color is the circle?"), and one pair about presence, as often "yes" as "no" ("is there a red
      circle?"). Whatever is said to be absent has a colour that is in the scene, so that colour and shape have to be
      seen together. `region`: (x0, y0, x1, y1) in pixels of the tile asked about, x1 and y1 exclusive; None where
      the answer is that there is no such tile. `kind`: shape, color or presence.
    - `"captions"`: three captions of each scene, which name the colour, shape and place of every tile: tile by tile in
      any order, row by row, and column by column. No two scenes of a split show the same, so that every caption fits
      one scene only.
    - `"nlvr2"`: a statement about two scenes ("only one image has a red circle"), once about a pair that it is true of
      and once about one that it is false of: the text alone says nothing. See `NLVR2_STATEMENTS` for what one image
      says. An image without a red circle has something red or a circle.
    - `"grounding"`: for each tile that its colour, its shape or both tell from all others, one expression that does
      ("the red shape", "the circle", "the red circle"), and for one tile of each scene its place ("the shape at the
      top left"). `box`: (x0, y0, x1, y1) in pixels of the shape itself, x1 and y1 exclusive.

    Args:
        task (`str`): `"vqa"`, `"captions"`, `"nlvr2"` or `"grounding"`.
        split (`str`): `"train"`, `"validation"` or `"test"`: the part of easy-VQA that all tiles are from. Splits have
            no tile in common, and different random numbers.
        num_scenes (`int`): Number of scenes, at least 1; for `"nlvr2"` the number of statements, with 4 scenes each.
        grid (`int`, *optional*): Tiles of 64 x 64 pixels along each side, 1 to 8. Default: `DEFAULT_GRID[task]`. With
            4, a region is at most a sixteenth of the image, so that a low keep rate needs the text.
        seed (`int`, *optional*, defaults to 0): Seed of all choices, mixed with the split.

    Returns:
        `Iterator[dict]`: Records in the columns that `load_task_dataset` reads. For `grid=2`, about six per scene for
        `"vqa"`, five for `"grounding"`; one for `"captions"`, two per statement for `"nlvr2"`. `image_id` is equal for
        records of one scene.

    Raises:
        `ValueError`: Where `grid` or `num_scenes` is out of its range.
    """
    check_scenes(task, split, num_scenes, grid)
    grid = DEFAULT_GRID[task] if grid is None else grid
    return _RECORDS[task](_Scenes(split, read_tiles(split), grid, random.Random(f"{seed} {split}")), num_scenes)


def check_scenes(task: str, split: str, num_scenes: int, grid: int | None):
    """Raises a `ValueError` where `scene_records` cannot make such scenes."""
    grid = DEFAULT_GRID[task] if grid is None else grid
    if not 1 <= grid <= MAX_GRID:
        raise ValueError(f"grid is {grid}: choose 1 to {MAX_GRID} tiles along each side of a scene.")
    if num_scenes < 1:
        raise ValueError(f"The number of {split} scenes is {num_scenes}: choose at least 1.")
    different = (len(EASY_VQA_COLORS) * len(EASY_VQA_SHAPES)) ** (grid * grid)
    if task == "captions" and num_scenes > different // 2:
        raise ValueError(
            f"{num_scenes} {split} scenes of {grid} x {grid} tiles cannot be told apart by captions, there are only "
            f"{different} different ones: choose a larger grid, or at most {different // 2} scenes."
        )


def read_tiles(split: str) -> list[Tile]:
    """The images of `easy_vqa_attributes(split)`, in that order."""
    paths = _read_easy_vqa(split).image_paths
    attributes = easy_vqa_attributes(split)
    return [Tile(*names, PIL.Image.open(paths[image_id]).convert("RGB")) for image_id, names in attributes.items()]


def cell_origin(cell: int, grid: int) -> tuple[int, int]:
    """The left and upper edge of a cell in pixels. Cells are numbered row by row from 0."""
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
    """Yields the kind of each question, the question, its answer and the cell it is about."""
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

# By statement: whether the left and the right image have what it names, where it is true and where it is false; each
# is equally likely. Who sees one image only can be right about three in four of the first three kinds, and about half
# of the last two.
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
    """A colour, a shape, or both."""
    color, shape = rng.choice(sorted(EASY_VQA_COLORS)), rng.choice(sorted(EASY_VQA_SHAPES))
    return rng.choice([(color, None), (None, shape), (color, shape)])


def _tiles_with(color: str | None, shape: str | None, has: bool, scenes: _Scenes) -> list[Tile]:
    """
    Tiles of which one shows what is named (`has`), or none. If both colour and shape are named, one of those that do
    not show it has the colour or the shape: that of `has=False` cannot be told by one of them.
    """
    rng, names = scenes.rng, list(scenes.tiles_by_name)
    fit = {name: (color in (None, name[0])) + (shape in (None, name[1])) for name in names}  # 2: what is named
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
    The box (x0, y0, x1, y1), x1 and y1 exclusive, of what stands out from the plain background of a tile, its
    most common colour. Pixels at the edge, mixed of both colours, count where they are at least half the shape's.
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
