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


@pytest.fixture(scope="module")
def questions(scenes):
    """Return (scene, question) for all questions."""
    return [(scene, question) for scene in scenes for question in scene.questions]


def test_every_scene_has_two_questions_of_each_kind(scenes):
    for scene in scenes:
        assert Counter(question["kind"] for question in scene.questions) == dict.fromkeys(KINDS, 2)
        answers = [question["answer"] for question in scene.questions if question["kind"] == "presence"]
        assert sorted(answers) == ["no", "yes"]
        assert len({question["question"] for question in scene.questions}) == 8


def named_in(question):
    return [word for word in question.replace("?", "").split() if word in COLORS or word in SHAPES]


def test_each_question_has_one_answer(questions):
    for scene, question in questions:
        named = named_in(question["question"])
        fits = [item for item in scene.items if all(word in (item.color, item.shape) for word in named)]
        if question["answer"] == "no":
            assert not fits
            assert question["region"] is None
            continue
        (item,) = fits
        assert question["region"] == list(item.box)
        answers = {"color": item.color, "shape": item.shape, "mark": item.mark, "presence": "yes"}
        assert question["answer"] == answers[question["kind"]]


def test_neither_color_nor_form_finds_what_both_name(questions):
    for scene, question in questions:
        if question["kind"] in ("mark", "presence"):
            for word in named_in(question["question"]):
                assert sum(word in (item.color, item.shape) for item in scene.items) >= 2


def words_of(wordings):
    return {word for text in wordings for word in text.replace("?", " ?").split()}


def wording_of(question):
    return question.replace(" ".join(named_in(question)), "{}")


def test_new_wordings_stand_in_the_test_split_alone_and_have_known_words(questions):
    """Half of the test questions; of both answers to "is there"."""
    held_out = set()
    for known, new in WORDINGS.values():
        assert len(known) >= 5
        assert len(new) == 2
        assert words_of(new) <= words_of(known)
        held_out.update(new)
    in_test = {wording_of(question["question"]) for _, question in questions}
    assert held_out <= in_test
    in_train = {wording_of(row["question"]) for row in busy_records("vqa", "train", 150)}
    assert not held_out & in_train
    answers = Counter(question["answer"] for _, question in questions if question["wording"] == "new")
    assert answers.total() == 600
    assert 50 < answers["yes"] < 100
    assert 50 < answers["no"] < 100


def test_boxes_hold_the_color_and_a_mark_in_white(scenes):
    for scene in scenes:
        pixels = np.asarray(scene.image, dtype=float)
        for item in scene.items:
            x0, y0, x1, y1 = item.box
            distance = np.abs(pixels[y0:y1, x0:x1] - COLORS[item.color]).max(axis=-1)
            assert (distance <= 26).mean() > 0.1  # shades differ by at most 26
            x = round((x0 + x1 - 1) / 2)
            y = round((y0 + y1 - 1) / 2 + 2 * (item.shape == "triangle"))
            is_white = (pixels[y - 4 : y + 5, x - 4 : x + 5] == 255).all(axis=-1)
            rows, columns = is_white.nonzero()
            left, top, right, bottom = MARKS[item.mark]
            assert np.ptp(columns) == right - left
            assert np.ptp(rows) == bottom - top
        cells = {(item.box[0] // 24, item.box[1] // 24) for item in scene.items}
        assert len(cells) == len(scene.items)


def test_scenes_depend_on_split_number_and_seed_alone():
    scene = draw_scene("train", 3)
    again = draw_scene("train", 3)
    assert np.array_equal(scene.image, again.image)
    assert scene.questions == again.questions
    for other in (draw_scene("test", 3), draw_scene("train", 4), draw_scene("train", 3, 1)):
        assert not np.array_equal(scene.image, other.image)
    few = list(busy_records("vqa", "train", 2))
    more = list(busy_records("vqa", "train", 3))
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
        is_shown = []
        for image_id in record["image_ids"]:
            items = scenes[image_id].items
            assert any(color == item.color or shape == item.shape for item in items)
            is_shown.append(any(color == item.color and shape == item.shape for item in items))
        assert record["label"] == truths[form](*is_shown), record["statement"]
        labels[form][record["label"]] += 1
    assert len(records) == 480
    assert sum(record["label"] for record in records) == 240
    assert len({image_id for record in records for image_id in record["image_ids"]}) == 120
    assert set(labels) == set(truths)
    for counts in labels.values():
        assert max(counts.values()) / counts.total() < 0.65


@pytest.mark.parametrize("task, grid", [("vqa", 1), ("captions", 2), ("nlvr2", 2), ("grounding", 4)])
def test_rows_are_those_of_the_records(task, grid):
    column = TASKS[task].text
    loaded = load(task, grid=grid, seed=5, train_scenes=6, validation_scenes=2, test_scenes=3)
    for split, size in {"train": 6, "validation": 2, "test": 3}.items():
        texts = []
        sources = []
        for number, record in enumerate(busy_records(task, split, size, grid, seed=5), start=1):
            for text in record.get("captions") or [record[column]]:
                texts.append(text)
                sources.append(f"busy_scenes {split} row {number}")
        rows = loaded[split]
        assert rows.features == TASKS[task].features
        assert rows[column][:] == texts
        assert rows["source"][:] == sources
