"""Files of the other tasks, in each format."""

import pytest
from loading import load, write, write_columns

from trips_examples.data.tasks import TASKS


CAPTIONS = [
    {"image": "a.png", "caption": "one"},
    {"image": "b.png", "captions": ["two", "three"], "image_id": 7},
]
STATEMENTS = [
    {"left_image": "a.png", "right_image": "b.png", "statement": "left", "label": "True"},
    {"images": ["b.png", "a.png"], "statement": "right", "label": 0, "image_ids": ["x", "y"], "question_id": "q"},
]
QUESTIONS = [
    {"image": "a.png", "question": "what?", "answer": "a", "region": [0, 1, 3.5, 3]},
    {"image": "b.png", "question": "what?", "answer": "b"},
]
EXPRESSIONS = [
    {"image": "a.png", "expression": "a dog", "box": [0, 1, 3.5, 3]},
    {"image": "b.png", "expression": "it", "box": [-0.5, 0, 32.5, 31], "question_id": "q"},
]
COLUMNS = {
    "captions": ["image", "image_id", "caption", "captions"],
    "nlvr2": ["left_image", "right_image", "images", "image_ids", "question_id", "statement", "label"],
    "grounding": ["image", "expression", "box", "question_id"],
}


def test_captions_of_each_format(folder, suffix):
    file = write_columns(folder / f"train.{suffix}", CAPTIONS, COLUMNS["captions"])
    rows = load("captions", train_file=file)["train"]
    assert rows.features == TASKS["captions"].features
    assert rows["caption"][:] == ["one", "two", "three"]
    assert rows["source"][:] == [f"train.{suffix} row {number}" for number in (1, 2, 2)]
    assert rows["image_id"][:] == [str(folder / "a.png"), "7", "7"]
    assert [image.size for image in rows["image"]] == [(4, 3), (32, 32), (32, 32)]


def test_statements_of_each_format(folder, suffix):
    file = write_columns(folder / f"train.{suffix}", STATEMENTS, COLUMNS["nlvr2"])
    rows = load("nlvr2", train_file=file)["train"]
    assert rows.features == TASKS["nlvr2"].features
    assert rows["label"][:] == [1, 0]
    assert rows["question_id"][:] == ["1", "q"]
    assert rows["image_ids"][:] == [[str(folder / "a.png"), str(folder / "b.png")], ["x", "y"]]
    assert [[image.size for image in pair] for pair in rows["images"]] == [[(4, 3), (32, 32)], [(32, 32), (4, 3)]]
    assert rows[0]["images"][0].mode == "L"


def test_expressions_of_each_format(folder, suffix):
    file = write_columns(folder / f"train.{suffix}", EXPRESSIONS, COLUMNS["grounding"])
    rows = load("grounding", train_file=file)["train"]
    assert rows.features == TASKS["grounding"].features
    assert rows["box"][:] == [[0, 1, 3.5, 3], [0, 0, 32, 31]]  # cut to the image
    assert rows["question_id"][:] == ["1", "q"]


BAD_OF_TASK = [
    ("captions", {"image": "a.png", "caption": " "}, "no caption"),
    ("captions", {"image": "a.png", "caption": ["one", ""]}, "an empty caption .number 2 of 2"),
    ("captions", {"image": "a.png", "caption": ["one", {"raw": "two"}]}, "a caption is not text"),
    ("nlvr2", {"images": ["a.png"], "statement": "s", "label": 1}, "not two images"),
    (
        "nlvr2",
        {"left_image": "a.png", "statement": "s", "label": 1},
        "no right_image .it has left_image, statement, label",
    ),
    ("nlvr2", {"images": ["a.png", "none.png"], "statement": "s", "label": 1}, "missing image"),
    ("nlvr2", {"images": ["a.png", "b.png"], "statement": "s", "label": 2}, "label is not 1, 0, true or false .2"),
    ("nlvr2", {"images": ["a.png", "b.png"], "statement": "s"}, "no label"),
    ("nlvr2", {"images": ["a.png", "b.png"], "label": 1}, "no statement"),
    ("nlvr2", {"images": ["a.png", "b.png"], "image_ids": ["x"], "statement": "s", "label": 1}, "not two image_ids"),
    (
        "nlvr2",
        {"images": ["a.png", "b.png"], "image_ids": ["x", "x"], "statement": "s", "label": 1},
        "image_id of two",
    ),
    ("grounding", {"image": "a.png", "expression": "e"}, "no box"),
    ("grounding", {"image": "a.png", "expression": "e", "box": [0, 0, 1]}, "box is not four numbers"),
    ("grounding", {"image": "a.png", "expression": "e", "box": [0, 0, "nan", 1]}, "box is not four numbers"),
    ("grounding", {"image": "a.png", "expression": "e", "box": 5}, "box is not four numbers"),
    ("grounding", {"image": "a.png", "expression": "e", "box": [2, 0, 2, 1]}, "box without area"),
    ("grounding", {"image": "a.png", "expression": "e", "box": [0, 0, 5.5, 3]}, "box outside the image .* is 4 x 3"),
    ("grounding", {"image": "a.png", "expression": "e", "box": [4, 0, 4.5, 3]}, "box outside the image"),
    ("grounding", {"image": "a.png", "box": [0, 0, 1, 1]}, "no expression"),
    (
        "vqa",
        {"image": "a.png", "question": "q", "answer": "a", "region": [0, 0, 5.5, 3]},
        "region outside the image .* is 4 x 3",
    ),
    ("vqa", {"image": "a.png", "question": "q", "answer": "a", "region": [1]}, "region is not four numbers"),
]


@pytest.mark.parametrize(("task", "record", "reason"), BAD_OF_TASK, ids=[reason for *_, reason in BAD_OF_TASK])
def test_bad_row_of_each_task_is_named(folder, task, record, reason):
    good = {"captions": CAPTIONS, "nlvr2": STATEMENTS, "grounding": EXPRESSIONS, "vqa": QUESTIONS}[task]
    file = write(folder / "train.jsonl", [*good, record])
    with pytest.raises(ValueError, match=f"1 of the 3 rows .*\n.*row 3: {reason}"):
        load(task, train_file=file)
    assert len(load(task, train_file=file, skip_bad_rows=True)["train"]) == (3 if task == "captions" else 2)


def test_labels_of_pandas(folder):
    """If a label is missing, pandas writes floats, and NaN for the missing one."""
    rows = [{**STATEMENTS[0], "label": label} for label in (1.0, 0.0, float("nan"))]
    file = write(folder / "train.jsonl", rows)
    with pytest.raises(ValueError, match="1 of the 3 rows .*\n.*row 3: no label"):
        load("nlvr2", train_file=file)
    assert load("nlvr2", train_file=file, skip_bad_rows=True)["train"]["label"][:] == [1, 0]


def test_regions_of_questions_are_read_where_there_are_some(folder):
    rows = load("vqa", train_file=write(folder / "train.jsonl", QUESTIONS))["train"]
    assert rows["region"][:] == [[0.0, 1.0, 3.5, 3.0], None]
