"""Busy scenes: balanced questions and statements, right answers and boxes."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from loading import load

from trips_examples.data.busy_scenes import COLORS, KINDS, MARKS, SHAPES, WORDINGS, busy_records, draw_scene
from trips_examples.data.tasks import TASKS


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene("test", number) for number in range(150)]


def questions_of(scenes):
    return [(scene, question) for scene in scenes for question in scene.questions]


def test_every_scene_has_two_questions_of_each_kind(scenes):
    for scene in scenes:
        assert Counter(question["kind"] for question in scene.questions) == dict.fromkeys(KINDS, 2)
        answers = [question["answer"] for question in scene.questions if question["kind"] == "presence"]
        assert sorted(answers) == ["no", "yes"]
        assert len({question["question"] for question in scene.questions}) == 8


def named_in(question: str) -> list[str]:
    return [word for word in question.replace("?", "").split() if word in COLORS or word in SHAPES]


def test_each_question_has_one_answer(scenes):
    for scene, question in questions_of(scenes):
        named = named_in(question["question"])
        fits = [item for item in scene.items if all(word in (item.color, item.shape) for word in named)]
        if question["answer"] == "no":
            assert not fits and question["region"] is None
            continue
        (item,) = fits
        assert question["region"] == list(item.box)
        answers = {"color": item.color, "shape": item.shape, "mark": item.mark, "presence": "yes"}
        assert question["answer"] == answers[question["kind"]]


def test_neither_color_nor_form_finds_what_both_name(scenes):
    for scene, question in questions_of(scenes):
        if question["kind"] in ("mark", "presence"):
            for word in named_in(question["question"]):
                assert sum(word in (item.color, item.shape) for item in scene.items) >= 2


def test_new_wordings_stand_in_the_test_split_alone_and_have_known_words(scenes):
    """Half of the test questions; of both answers to "is there"."""

    def templates(texts):
        return {" ".join("{}" if word in (*COLORS, *SHAPES) else word for word in text.split()) for text in texts}

    def words(wordings):
        return {word for text in wordings for word in text.replace("?", " ?").split()}

    for known, new in WORDINGS.values():
        assert len(known) >= 5 and len(new) == 2 and words(new) <= words(known)
    held_out = {text for _, new in WORDINGS.values() for text in new}
    train = [row["question"] for row in busy_records("vqa", "train", 150)]
    for is_new, texts in ((False, train), (True, (each["question"] for _, each in questions_of(scenes)))):
        forms = {
            " ".join("{}" if word.strip("?") in {*COLORS, *SHAPES} else word for word in t.split()) for t in texts
        }
        assert bool(forms & {text.replace("{}?", "{}") for text in held_out}) is is_new
    counts = Counter((question["wording"], question["answer"]) for _, question in questions_of(scenes))
    assert sum(number for (wording, _), number in counts.items() if wording == "new") == 600
    assert 50 < counts["new", "yes"] < 100 and 50 < counts["new", "no"] < 100


def test_boxes_hold_the_color_and_a_mark_in_white(scenes):
    for scene in scenes:
        pixels = np.asarray(scene.image, dtype=float)
        for item in scene.items:
            x0, y0, x1, y1 = item.box
            distance = np.abs(pixels[y0:y1, x0:x1] - COLORS[item.color]).max(axis=-1)
            assert (distance <= 26).mean() > 0.1  # shades differ by at most 26
            x, y = round((x0 + x1 - 1) / 2), round((y0 + y1 - 1) / 2 + 2 * (item.shape == "triangle"))
            white = (pixels[y - 4 : y + 5, x - 4 : x + 5] == 255).all(axis=-1)
            rows, columns = (white.any(axis=axis).nonzero()[0] for axis in (1, 0))
            box = MARKS[item.mark]
            assert (np.ptp(columns), np.ptp(rows)) == (box[2] - box[0], box[3] - box[1])
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
        "the left image has": lambda left, right: left,
        "the right image has": lambda left, right: right,
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


@pytest.mark.parametrize(("task", "grid"), [("vqa", 1), ("captions", 2), ("nlvr2", 2), ("grounding", 4)])
def test_rows_are_those_of_the_records(task, grid):
    sizes = {"train": 6, "validation": 2, "test": 3}
    loaded = load(task, grid=grid, seed=5, **{f"{split}_scenes": size for split, size in sizes.items()})
    for split, size in sizes.items():
        rows, records = loaded[split], list(busy_records(task, split, size, grid, seed=5))
        assert rows.features == TASKS[task].features
        texts = [record.get("captions") or [record[TASKS[task].text]] for record in records]
        assert rows[TASKS[task].text][:] == sum(texts, [])
        numbers = [number for number, several in enumerate(texts, start=1) for _ in several]
        assert rows["source"][:] == [f"busy_scenes {split} row {number}" for number in numbers]
