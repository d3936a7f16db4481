"""easy-VQA and its scenes, checked against pixels."""

import io
import re
from collections import Counter

import numpy as np
import PIL.Image
import pytest
from example_scenes import (
    DEFAULT_GRID,
    EASY_VQA_COLORS,
    EASY_VQA_SHAPES,
    easy_vqa_attributes,
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


# easy-VQA


def color_and_shape(tile):
    """What a tile shows, by its pixels alone: the colour there is most of, and the outer rows of what has it."""
    masks = {color: (tile == rgb).all(-1) for color, rgb in RGB.items()}
    color, mask = max(masks.items(), key=lambda item: item[1].sum())
    ys, xs = np.nonzero(mask)
    box = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    return color, "rectangle" if box[0].all() else "triangle" if box[-1].all() else "circle"


@pytest.mark.parametrize(("split", "resolved"), [("train", 3578), ("test", 888)])
def test_attributes_fit_the_pixels(split, resolved):
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    attributes = easy_vqa_attributes(split)
    assert len(attributes) == resolved
    for image_id in list(attributes)[::2]:
        assert attributes[image_id] == color_and_shape(np.asarray(PIL.Image.open(paths[image_id]))), image_id


def test_contradicting_questions_name_the_image(monkeypatch):
    questions = (["what color is the shape?", "is there a red shape?"], ["red", "no"], [7, 7])
    monkeypatch.setattr(easy_vqa, "get_test_questions", lambda: questions)
    with pytest.raises(ValueError, match="test image 7 .*'is there a red shape\\?' with the answer 'no'"):
        easy_vqa_attributes("test")


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
    """Pixels of the tiles by box."""
    pixels = np.asarray(image)
    assert pixels.shape == (grid * 64, grid * 64, 3)
    origins = [(x, y) for y in range(0, grid * 64, 64) for x in range(0, grid * 64, 64)]
    return {(x, y, x + 64, y + 64): pixels[y : y + 64, x : x + 64] for x, y in origins}


def expected_answer(question, shown):
    """Answer and box by the tiles' pixels; fails where the question does not name one tile."""
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
    return answer, boxes[0]


def test_scenes_answers_and_boxes_fit_the_pixels(scenes):
    _, grid, rows = scenes
    kinds = Counter()
    for row in rows:
        shown = {box: color_and_shape(tile) for box, tile in tiles_of(row["image"], grid).items()}
        assert (row["answer"], row["target_box"]) == expected_answer(row["question"], shown), row
        kinds[row["question"].split()[1]] += 1
    assert len(kinds) == 3, kinds


def test_scenes_ask_for_all_that_is_unique(scenes):
    _, grid, rows = scenes
    asked = {}
    for row in rows:
        asked.setdefault(row["image_id"], []).append(row["question"])
    images = {row["image_id"]: row["image"] for row in rows}
    for image_id, questions in asked.items():
        shown = [color_and_shape(tile) for tile in tiles_of(images[image_id], grid).values()]
        unique = sum(count == 1 for names in zip(*shown, strict=True) for count in Counter(names).values())
        assert sum(question.startswith("what") for question in questions) == unique, image_id


def test_scenes_tiles_are_from_the_split(scenes):
    split, grid, rows = scenes
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    known = {PIL.Image.open(path).convert("RGB").tobytes() for path in paths.values()}
    images = {row["image_id"]: row["image"] for row in rows}
    assert len(images) == 60
    for image_id, image in images.items():
        pixels = {tile.tobytes() for tile in tiles_of(image, grid).values()}
        assert len(pixels) == grid**2, f"{image_id} repeats a tile"
        assert pixels <= known, f"{image_id} has a tile that is not of {split}"


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


@pytest.mark.parametrize("arguments", [{"grid": 0}, {"grid": 9}, {"num_scenes": 0}])
def test_scenes_out_of_range(arguments):
    with pytest.raises(ValueError, match="choose"):
        scene_records("vqa", "test", **{"num_scenes": 1, **arguments})


def test_box_of_a_shape_by_hand():
    tile = PIL.Image.new("RGB", (64, 64), (240, 250, 245))
    tile.paste((255, 0, 0), (10, 20, 13, 22))
    tile.paste((247, 125, 122), (13, 20, 14, 22))  # mixed half and half
    tile.paste((242, 200, 195), (9, 20, 10, 22))  # hardly its own
    assert shape_box(tile) == (10, 20, 14, 22)
