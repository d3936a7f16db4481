"""Busy scenes: balanced questions and statements, right answers and boxes."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from loading import load

from trips_examples.data.busy_scenes import COLORS, KINDS, SHAPES, busy_records, draw_scene
from trips_examples.data.tasks import TASKS


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene("test", number) for number in range(150)]


def questions_of(scenes):
    return [(scene, question) for scene in scenes for question in scene.questions]


def test_every_scene_has_two_questions_of_each_kind(scenes):
    for scene in scenes:
        assert Counter(question.kind for question in scene.questions) == dict.fromkeys(KINDS, 2)
        answers = [question.answer for question in scene.questions if question.kind == "presence"]
        assert sorted(answers) == ["no", "yes"]
        assert len({question.text for question in scene.questions}) == 8


def test_each_question_has_one_answer(scenes):
    for scene, question in questions_of(scenes):
        words = question.text.replace("?", "").split()
        named = [word for word in words if word in COLORS or word in SHAPES]
        fits = [item for item in scene.items if all(word in (item.color, item.shape) for word in named)]
        if question.answer == "no":
            assert not fits and question.region is None
            assert any(item.color == named[0] for item in scene.items)  # neither word alone gives the answer
            assert any(item.shape == named[1] for item in scene.items)
            continue
        (item,) = fits
        assert question.region == item.box
        answers = {"color": item.color, "shape": item.shape, "place": item.place, "presence": "yes"}
        assert question.answer == answers[question.kind]


def test_boxes_hold_the_color_and_places_are_quarters(scenes):
    for scene in scenes:
        pixels = np.asarray(scene.image, dtype=float)
        for item in scene.items:
            x0, y0, x1, y1 = item.box
            distance = np.abs(pixels[y0:y1, x0:x1] - COLORS[item.color]).max(axis=-1)
            assert (distance <= 26).mean() > 0.1  # shades differ by at most 26
            assert ("top" in item.place) == (y0 + y1 < 96)
            assert ("left" in item.place) == (x0 + x1 < 96)
        assert len({(item.box[0] // 24, item.box[1] // 24) for item in scene.items}) == len(scene.items)


def test_scenes_depend_on_split_number_and_seed_alone():
    first, again, other, seeded = (
        draw_scene(*arguments) for arguments in (("train", 3), ("train", 3), ("test", 3), ("train", 3, 1))
    )
    assert np.array_equal(first.image, again.image) and first.questions == again.questions
    assert not np.array_equal(first.image, other.image) and not np.array_equal(first.image, seeded.image)
    few, more = (list(busy_records("vqa", "train", number)) for number in (2, 3))
    assert more[: len(few)] == few


def test_statements_are_true_of_their_scenes_and_the_text_alone_does_not_tell():
    """An image without the named shape has its color or its form."""
    records = list(busy_records("nlvr2", "test", 60))
    scenes = {f"test scene {number + 1}": draw_scene("test", number) for number in range(240)}
    truths = {
        "both images have": lambda left, right: left and right,
        "only the left image has": lambda left, right: left and not right,
        "only the right image has": lambda left, right: right and not left,
        "only one image has": lambda left, right: left != right,
        "or neither has": lambda left, right: left == right,
    }
    labels = defaultdict(Counter)
    for record in records:
        *start, color, shape = record["statement"].removesuffix(" or neither has").split()
        form = "or neither has" if record["statement"].endswith("neither has") else " ".join(start[:-1])
        items = [scenes[image_id].items for image_id in record["image_ids"]]
        there = [any((item.color, item.shape) == (color, shape) for item in side) for side in items]
        assert record["label"] == truths[form](*there), record["statement"]
        for side in items:
            assert any(color == item.color or shape == item.shape for item in side)
        labels[form][record["label"]] += 1
    assert len(records) == 480 and sum(record["label"] for record in records) == 240
    assert len({image_id for record in records for image_id in record["image_ids"]}) == 120
    assert set(labels) == set(truths)
    for counts in labels.values():
        assert max(counts.values()) / counts.total() < 0.65


@pytest.mark.parametrize(
    ("task", "grid"), [(task, grid) for task in TASKS for grid in (1, 2, 4) if task != "nlvr2" or grid > 1]
)
def test_rows_are_those_of_the_records(task, grid):
    image, image_id, per_scene = ("images", "image_ids", 2) if task == "nlvr2" else ("image", "image_id", 1)
    sizes = {"train": 6, "validation": 2, "test": 3}
    loaded = load(task, grid=grid, seed=5, **{f"{split}_scenes": size for split, size in sizes.items()})
    assert list(loaded) == list(sizes)
    for split, size in sizes.items():
        rows, records = loaded[split], list(busy_records(task, split, size, grid, seed=5))
        assert rows.features == TASKS[task].features
        texts = [record.get("captions") or [record[TASKS[task].text]] for record in records]
        assert rows[TASKS[task].text][:] == sum(texts, [])
        numbers = [number for number, several in enumerate(texts, start=1) for _ in several]
        assert rows["source"][:] == [f"busy_scenes {split} row {number}" for number in numbers]
        assert len(np.unique(rows[image_id][:])) == per_scene * size
        assert rows[0][image] is not None and all(rows[TASKS[task].text])
    if task == "captions":
        words = set(" ".join(rows["caption"]).replace(",", " ").split())
        assert words & set(COLORS) and words & set(SHAPES)
        assert any(word.startswith(("top", "bottom")) for word in words) == (grid > 1)
