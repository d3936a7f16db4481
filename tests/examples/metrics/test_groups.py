"""Accuracy by kind of text and by size of the target region."""

import evaluate
from datasets import Dataset

from trips_examples.metrics import GROUNDING_ACCURACY, VQA_ACCURACY
from trips_examples.metrics.diagnostics import accuracy_by_group, groups_of


BOXES = [[0, 0, 9, 9], [0, 0, 12, 1], [5, 5, 10, 10], [0, 0, 2, 1]]  # areas and widths differ in order
KINDS = ["name", "size", "name", "place"]


def test_boxes_by_kind_and_size():
    rows = Dataset.from_dict({"kind": KINDS, "box": BOXES})
    wrong = [50, 50, 60, 60]
    found = [BOXES[0], BOXES[1], wrong, wrong]
    metrics = accuracy_by_group(evaluate.load(GROUNDING_ACCURACY), found, rows["box"], rows)
    assert metrics == {
        "eval_accuracy_name": 0.5,
        "eval_accuracy_place": 0.0,
        "eval_accuracy_size": 1.0,
        "eval_accuracy_smallest": 0.5,  # thirds of the four boxes by area: 3, 1; 2; 0
        "eval_accuracy_medium": 0.0,
        "eval_accuracy_largest": 1.0,
    }


def test_answers_by_kind_and_by_the_size_of_what_is_there():
    """Rows of no kind are in no group of kinds."""
    rows = Dataset.from_dict({"kind": [*KINDS[:3], None], "region": [BOXES[0], None, BOXES[2], None]})
    assert groups_of(rows) == {"name": [0, 2], "size": [1], "smallest": [2], "medium": [0]}
    metrics = accuracy_by_group(
        evaluate.load(VQA_ACCURACY), ["owl", "no", "bat", "2"], [["owl"], ["yes"], ["cat"], ["2"]], rows
    )
    scores = {"name": 0.5, "size": 0.0, "smallest": 0.0, "medium": 1.0}
    assert metrics == {f"eval_accuracy_{name}": score for name, score in scores.items()}
    assert groups_of(Dataset.from_dict({"kind": [None] * 4, "region": [None] * 4})) == {}
