"""easy-VQA and its scenes, checked against pixels."""

import functools
import io
import itertools
import re
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import PIL.Image
import pytest

from trips_examples.data import scenes as scenes_module
from trips_examples.data.scenes import (
    DEFAULT_GRID,
    EASY_VQA_COLORS,
    EASY_VQA_SHAPES,
    NLVR2_STATEMENTS,
    SPLITS,
    _Scenes,
    scene_records,
    shape_box,
)


easy_vqa = pytest.importorskip("easy_vqa")

RGB = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


@pytest.fixture(scope="module", autouse=True)
def tiles_are_read_once():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(scenes_module, "read_tiles", functools.cache(scenes_module.read_tiles))
        yield


# easy-VQA


def color_and_shape(tile):
    """Infer color and shape of a tile from its pixels: the most common color, and the outer rows of the shape."""
    masks = {color: (tile == rgb).all(-1) for color, rgb in RGB.items()}
    color, mask = max(masks.items(), key=lambda item: item[1].sum())
    ys, xs = np.nonzero(mask)
    box = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    return color, "rectangle" if box[0].all() else "triangle" if box[-1].all() else "circle"


def image_paths(split):
    return easy_vqa.get_test_image_paths() if split == "test" else easy_vqa.get_train_image_paths()


# Scenes


@pytest.fixture(scope="module", params=[("train", 2), ("test", 3)], ids=["train 2x2", "test 3x3"])
def scenes(request):
    split, grid = request.param
    return split, grid, decoded(scene_records("vqa", split, num_scenes=60, grid=grid))


def decoded(records):
    return [{**record, "image": picture(record["image"])} for record in records]


def picture(encoded):
    assert encoded["path"] is None
    return PIL.Image.open(io.BytesIO(encoded["bytes"])).convert("RGB")


def tiles_of(image, grid):
    """Return the pixels of the tiles by box."""
    pixels = np.asarray(image)
    assert pixels.shape == (grid * 64, grid * 64, 3)
    origins = [(x, y) for y in range(0, grid * 64, 64) for x in range(0, grid * 64, 64)]
    return {(x, y, x + 64, y + 64): pixels[y : y + 64, x : x + 64] for x, y in origins}


def expected_answer(question, shown):
    """Return answer and box from the tiles' pixels. Fail if the question does not name one tile."""
    words = re.findall(r"\w+", question)
    if match := re.fullmatch(r"is there a (\w+) (\w+)\?", question):
        boxes = [box for box, tile in shown.items() if tile == match.groups()]
        if not boxes:
            assert any(color == match[1] for color, _ in shown.values()), question
            return "no", None
        answer = "yes"
    else:
        asked = {"shape": 1, "color": 0}[words[1]]
        named = next(word for word in words[2:] if word in EASY_VQA_COLORS | EASY_VQA_SHAPES)
        boxes = [box for box, tile in shown.items() if named in tile]
        answer = shown[boxes[0]][asked]
    assert len(boxes) == 1, f"{question} names {len(boxes)} tiles"
    return answer, list(boxes[0])


def test_scenes_answers_and_boxes_fit_the_pixels(scenes):
    _, grid, rows = scenes
    kinds = Counter()
    shown_by_scene = {}
    for row in rows:
        if row["image_id"] not in shown_by_scene:
            shown = {box: color_and_shape(tile) for box, tile in tiles_of(row["image"], grid).items()}
            shown_by_scene[row["image_id"]] = shown
        shown = shown_by_scene[row["image_id"]]
        assert (row["answer"], row["region"]) == expected_answer(row["question"], shown), row
        kinds[row["question"].split()[1]] += 1
        assert row["kind"] == {"there": "presence"}.get(word := row["question"].split()[1], word)
    assert len(kinds) == 3, kinds


def test_scenes_tiles_are_from_the_split(scenes):
    split, grid, rows = scenes
    paths = image_paths(split)
    known = {PIL.Image.open(path).convert("RGB").tobytes() for path in paths.values()}
    images = {row["image_id"]: row["image"] for row in rows}
    assert len(images) == 60
    for image_id, image in images.items():
        pixels = {tile.tobytes() for tile in tiles_of(image, grid).values()}
        assert len(pixels) == grid**2, f"{image_id} repeats a tile"
        assert pixels <= known, f"{image_id} has a tile that is not of {split}"


def test_splits_have_no_tile_in_common():
    shown = {split: {tile.image.tobytes() for tile in scenes_module.read_tiles(split)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not shown[one] & shown[other], (one, other)


@pytest.mark.parametrize("task", ["vqa", "grounding"])
def test_in_a_grid_of_four_a_region_is_at_most_a_tenth_of_the_image(task):
    """Texts about one scene have different target regions, so that scoring by the image is not enough."""
    regions = defaultdict(set)
    for record in scene_records(task, "validation", 40, grid=4):
        box = record.get("region") or record.get("box")
        if box is not None:
            x0, y0, x1, y1 = box
            assert (x1 - x0) * (y1 - y0) <= 256**2 / 10
            regions[record["image_id"]].add(tuple(box))
    numbers = [len(of_scene) for of_scene in regions.values()]
    assert len(numbers) == 40 and sum(numbers) > 2 * 40


def test_scenes_presence_is_balanced(scenes):
    _, _, rows = scenes
    answers = Counter(row["answer"] for row in rows)
    assert answers["yes"] == answers["no"] > 50


@pytest.mark.parametrize("task", DEFAULT_GRID)
def test_scenes_are_determined_by_their_arguments(task):
    def drawn(split="test", num_scenes=3, **arguments):
        return list(scene_records(task, split, num_scenes, **arguments))

    base = drawn()
    assert drawn() == base
    assert drawn(num_scenes=5)[: len(base)] == base
    for changed in (drawn(seed=1), drawn("train"), drawn(grid=3)):
        assert changed[0] != base[0]


def test_box_of_a_shape_by_hand():
    tile = PIL.Image.new("RGB", (64, 64), (240, 250, 245))
    tile.paste((255, 0, 0), (10, 20, 13, 22))
    tile.paste((247, 125, 122), (13, 20, 14, 22))  # mixed half and half
    tile.paste((242, 200, 195), (9, 20, 10, 22))  # hardly its own
    assert shape_box(tile) == (10, 20, 14, 22)


def shown_in(image, grid):
    """Infer color and shape of each tile from its pixels, row by row."""
    return [color_and_shape(tile) for tile in tiles_of(image, grid).values()]


# Captions

PLACES = {"top left": 0, "top right": 1, "bottom left": 2, "bottom right": 3}


def described(caption):
    """Parse a caption of a 2 x 2 scene to a description of each tile, row by row."""
    names = re.findall(r"\ba (\w+) (\w+)", caption)
    assert len(names) == 4, caption
    if caption.startswith("a "):
        cells = [PLACES[place] for place in re.findall(r"at the (\w+ \w+)", caption)]
    elif caption.startswith("the top row has"):
        cells = [0, 1, 2, 3]
    else:
        assert caption.startswith("the left column has"), caption
        cells = [0, 2, 1, 3]
    assert sorted(cells) == [0, 1, 2, 3]
    return [name for _, name in sorted(zip(cells, names, strict=True))]


def test_captions_fit_the_pixels():
    starts, orders = Counter(), set()
    for record in scene_records("captions", "test", 80):
        shown = shown_in(picture(record["image"]), 2)
        assert len(record["captions"]) == 3
        for caption in record["captions"]:
            assert described(caption) == shown
            starts[caption.split()[1]] += 1
        orders.add(tuple(re.findall(r"at the (\w+ \w+)", record["captions"][0])))
    assert starts["top"] == starts["left"] == 80
    assert len(orders) > 15  # of the 24


@pytest.mark.parametrize(("split", "number"), [("train", 4000), ("test", 1000)])
def test_captions_fit_one_scene_only(split, number, monkeypatch):
    monkeypatch.setattr(_Scenes, "paste", lambda self, tiles: None)  # texts only
    records = list(scene_records("captions", split, number))
    captions = [caption for record in records for caption in record["captions"]]
    assert len(set(captions)) == len(captions) == 3 * number
    assert len({tuple(described(record["captions"][0])) for record in records}) == number


# Statements about two images


def holds(statement, left, right):
    """Return whether a statement is true of two images."""
    kind, color, shape = re.fullmatch(r"(.*) ha(?:s|ve) a (?:(\w+) )?(\w+?)(?: or neither has)?", statement).groups()
    has = [
        any((color in (None, tile[0])) and (shape in ("shape", tile[1])) for tile in shown) for shown in (left, right)
    ]
    if statement.endswith("or neither has"):
        return has[0] == has[1]
    return {
        "both images": has[0] and has[1],
        "only the left image": has[0] and not has[1],
        "only the right image": has[1] and not has[0],
        "only one image": has[0] != has[1],
    }[kind]


@pytest.mark.parametrize("grid", [1, 2])
def test_statements_fit_the_pixels(grid):
    kinds = Counter()
    for record in scene_records("nlvr2", "test", 60, grid=grid):
        left, right = (shown_in(picture(image), grid) for image in record["images"])
        assert holds(record["statement"], left, right) == record["label"], record["statement"]
        kinds[re.sub(r" a .*", "", record["statement"]) + record["statement"][-4:]] += 1
    assert len(set(kinds)) >= 5


def test_statements_alone_say_nothing(monkeypatch):
    """Each statement comes with a pair for which it is true and a pair for which it is false."""
    monkeypatch.setattr(_Scenes, "paste", lambda self, tiles: None)
    records = list(scene_records("nlvr2", "train", 2000))
    pairs = list(zip(records[::2], records[1::2], strict=True))
    assert len(pairs) == 2000
    assert all(true["statement"] == false["statement"] for true, false in pairs)
    assert all((true["label"], false["label"]) == (True, False) for true, false in pairs)
    image_ids = [image_id for record in records for image_id in record["image_ids"]]
    assert len(set(image_ids)) == 8000


@pytest.mark.parametrize("statement", NLVR2_STATEMENTS)
def test_one_image_says_what_the_table_claims(statement):
    """The accuracy of the best guess from one image is computed exactly."""
    right = Fraction(0)
    true_pairs, false_pairs = NLVR2_STATEMENTS[statement]
    for side in (0, 1):
        for has in (True, False):
            true, false = (
                Fraction(sum(pair[side] == has for pair in pairs), len(pairs)) for pairs in (true_pairs, false_pairs)
            )
            right += max(true, false) / 4  # half of the pairs are true, and either image may be seen
    expected = Fraction(1, 2) if "one image" in statement or "neither" in statement else Fraction(3, 4)
    assert right == expected
    for pairs, label in ((true_pairs, True), (false_pairs, False)):
        named = statement.format("a red circle")
        for left, right in pairs:
            shown = [[("red", "circle")] if has else [("red", "triangle")] for has in (left, right)]
            assert holds(named, *shown) == label


def test_images_without_what_is_named_are_alike():
    """Neither color nor shape alone determines whether there is a red circle."""
    seen = Counter()
    for record in scene_records("nlvr2", "test", 150):
        if match := re.search(r"a (\w+) (circle|rectangle|triangle)", record["statement"]):
            for image in record["images"]:
                ((color, shape),) = shown_in(picture(image), 1)
                seen[(color == match[1]) + (shape == match[2])] += 1
    assert seen[0] == 0 and seen[1] > 50 and seen[2] > 50


# Grounding


def test_boxes_fit_the_pixels():
    """Boxes contain all pixels of the named color. Pixels at the edge are mixed, so a box may be larger."""
    kinds = Counter()
    for record in scene_records("grounding", "test", 60):
        pixels = np.asarray(picture(record["image"]))
        shown = shown_in(pixels, 2)
        words = record["expression"].split()
        if "at" in words:
            cell, kind = PLACES[" ".join(words[-2:])], "place"
        else:
            names = set(words) & (EASY_VQA_COLORS | EASY_VQA_SHAPES)
            (cell,) = [cell for cell, tile in enumerate(shown) if names <= set(tile)]
            kind = len(names), "shape" in words
        kinds[kind] += 1
        mask = (pixels == RGB[shown[cell][0]]).all(-1)
        mask[: 64 * (cell // 2)] = mask[64 * (cell // 2 + 1) :] = False
        mask[:, : 64 * (cell % 2)] = mask[:, 64 * (cell % 2 + 1) :] = False
        ys, xs = np.nonzero(mask)
        exact = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        grown = (np.array(record["box"]) - exact) * [-1, -1, 1, 1]
        assert ((grown >= 0) & (grown <= 2)).all(), (record["expression"], exact, record["box"])
    assert kinds["place"] == 60
    assert len(kinds) == 4 and min(kinds.values()) > 10, kinds
