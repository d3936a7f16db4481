"""easy-VQA and its scenes as rows, checked against pixels."""

import re
import sys
from collections import Counter

import numpy as np
import pytest
from loading import load
from test_scenes import color_and_shape

from trips_examples.data.scenes import EASY_VQA_COLORS, EASY_VQA_SHAPES, scene_records
from trips_examples.data.tasks import TASKS


@pytest.fixture(scope="module")
def easy_vqa_dataset():
    pytest.importorskip("easy_vqa")
    return load("vqa")


def test_easy_vqa_has_its_official_test_split_and_a_tenth_of_the_training_images_as_validation(easy_vqa_dataset):
    assert list(easy_vqa_dataset) == ["train", "validation", "test"]
    counts = {"train": (34683, 3600), "validation": (3892, 400), "test": (9673, 1000)}
    for split, (questions, images) in counts.items():
        rows = easy_vqa_dataset[split]
        assert (len(rows), len(set(rows["image_id"]))) == (questions, images)
        answers = {answer for answers in rows["answers"] for answer in answers}
        assert answers == EASY_VQA_COLORS | EASY_VQA_SHAPES | {"yes", "no"}
    images = {image_id for split in counts for image_id in easy_vqa_dataset[split]["image_id"]}
    assert len(images) == 5000


def test_easy_vqa_row(easy_vqa_dataset):
    rows = easy_vqa_dataset["test"]
    assert rows.features == TASKS["vqa"].features
    row = rows[2]
    x0, y0, x1, y1 = row["region"]  # of the shape: its color, except for the edge
    shape = np.asarray(row["image"].crop((x0 + 1, y0 + 1, x1 - 1, y1 - 1)))
    background = np.asarray(row["image"])[0, 0]
    assert (np.abs(shape.astype(int) - background).sum(axis=-1) > 0).mean() > 0.5
    assert row["source"] == "easy_vqa test row 3"
    assert (row["image"].size, row["image"].mode) == ((64, 64), "RGB")


def test_easy_vqa_answers_fit_the_pixels(easy_vqa_dataset):
    """Each question also has its own image."""
    rows = easy_vqa_dataset["train"].select(range(0, 34683, 87))
    seen = Counter()
    for row in rows:
        color, shape = color_and_shape(np.asarray(row["image"]))
        if row["answers"][0] in {"yes", "no"}:
            negated = bool(re.search(r"\b(no|not)\b", row["question"]))
            named = bool({color, shape} & set(re.findall(r"\w+", row["question"])))
            assert row["answers"] == ["yes" if named != negated else "no"], row
        else:
            assert row["answers"][0] in {color, shape}, row
        seen[row["answers"][0]] += 1
    assert len(seen) == 13


def test_missing_easy_vqa_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ImportError, match="pip install easy-vqa"):
        load("vqa", "easy_vqa")


@pytest.mark.parametrize("task", TASKS)
def test_scenes_of_each_task(task):
    pytest.importorskip("easy_vqa")
    sizes = {"train": 3, "validation": 2, "test": 4}
    loaded = load(task, "easy_vqa_scenes", seed=5, **{f"{split}_scenes": size for split, size in sizes.items()})
    assert list(loaded) == list(sizes)
    for split, size in sizes.items():
        rows, records = loaded[split], list(scene_records(task, split, size, seed=5))
        assert rows.features == TASKS[task].features
        several = [record.get("captions") or [record[TASKS[task].text]] for record in records]
        assert rows[TASKS[task].text][:] == sum(several, [])
        numbers = [number for number, texts in enumerate(several, start=1) for _ in texts]
        assert rows["source"][:] == [f"easy_vqa_scenes {split} row {number}" for number in numbers]
