"""VQA accuracy: hand-worked values of the official rule."""

import evaluate
import pytest

from trips_examples.metrics import VQA_ACCURACY
from trips_examples.metrics.vqa_accuracy import VqaAccuracy, normalize_answer, vqa_score


SCRIPT = VQA_ACCURACY


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("the red.", "red"),
        ("A dog, an owl and the cat!", "dog owl and cat"),
        ("another theme", "another theme"),
        ("Two", "2"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("yall'd've", "y'all'd've"),
        ("'ows'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("its", "its"),
        ("1,000", "1000"),
        ("1.5", "1.5"),
        ("u.s.", "us"),
        ("12:30", "12:30"),
        ("black-white", "black white"),
        ("black - white-ish", "black whiteish"),
        ("1,000-2", "10002"),
        ("yes\n\tno ", "yes no"),
        ("", ""),
        ("the", ""),
    ],
)
def test_normalize_answer(text, normalized):
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)])
def test_ten_annotators(matches, score):
    assert vqa_score("red", ["red"] * matches + ["blue"] * (10 - matches)) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("red", ["red"], 1),
        ("red", ["blue"], 0),
        ("The two.", ["2"], 1),
        ("2", ["two"] * 10, 1),
        ("red", ["red", "red"], 1 / 3),
        ("red", ["red", "red", "red"], 2 / 3),
        ("red", ["red", "blue"], (0 + 1 / 3) / 2),
        ("red", ["Red", "the red", "red.", "red"], 1),
    ],
)
def test_few_annotators(prediction, answers, score):
    assert vqa_score(prediction, answers) == pytest.approx(score, abs=1e-12)


def test_no_answers_name_the_prediction():
    with pytest.raises(ValueError, match="'red'.*at least one"):
        vqa_score("red", [])


PREDICTIONS = ["red", "yes", "Two", "yes"]
REFERENCES = [["red"] * 2 + ["blue"] * 8, ["yes"], ["2"], ["no"]]


@pytest.mark.parametrize("load", [VqaAccuracy, lambda: evaluate.load(str(SCRIPT))], ids=["import", "load"])
def test_metric(load):
    metric = load()
    assert metric.compute(predictions=PREDICTIONS, references=REFERENCES) == {"accuracy": pytest.approx(2.6 / 4)}


def test_metric_in_batches():
    metric = VqaAccuracy()
    for start in (0, 2):
        metric.add_batch(predictions=PREDICTIONS[start : start + 2], references=REFERENCES[start : start + 2])
    assert metric.compute()["accuracy"] == pytest.approx(2.6 / 4)


def test_accuracy_by_most_common_answer_most_frequent_first():
    result = VqaAccuracy().compute(
        predictions=["red", "no", "Yes"], references=[["blue", "blue", "red"], ["yes"], ["yes."]], by_answer=True
    )
    assert result == {
        "accuracy": pytest.approx((2 / 9 + 0 + 1) / 3),
        "by_answer": {
            "yes": {"accuracy": 0.5, "count": 2},
            "blue": {"accuracy": pytest.approx(2 / 9), "count": 1},
        },
    }
    assert list(result["by_answer"]) == ["yes", "blue"]


def test_metric_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one prediction"):
        VqaAccuracy().compute(predictions=[], references=[])
