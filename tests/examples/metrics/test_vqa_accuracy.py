"""VQA accuracy: values of the official rule by hand."""

from functools import partial

import evaluate
import pytest
from places import EXAMPLES

from trips_examples.metrics.vqa_accuracy import VqaAccuracy, answer_score, exact_match, normalize_answer, vqa_accuracy


@pytest.mark.parametrize(
    "text, normalized",
    [
        ("the red.", "red"),
        ("A dog, an owl and the cat!", "dog owl and cat"),
        ("Two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),
        ("yall'd've", "y'all'd've"),
        ("somethingd", "something'd"),
        ("1,000", "1000"),
        ("1.5", "1.5"),
        ("u.s.", "us"),
        ("12:30", "12:30"),
        ("black - white-ish", "black whiteish"),
        ("1,000-2", "10002"),
        ("yes\n\tno ", "yes no"),
        ("the", ""),
    ],
)
def test_normalize_answer(text, normalized):
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    "prediction, answers, score",
    [
        ("red", ["Red", "the red", "red.", "red"], 1),
        ("The two.", ["2"] * 9 + ["3"], 1),
    ],
)
def test_several_annotators(prediction, answers, score):
    assert vqa_accuracy(prediction, answers) == pytest.approx(score, abs=1e-12)


def test_unanimous_answers_are_compared_as_they_are():
    """The official script only normalizes answers if annotators disagree."""
    assert vqa_accuracy("2", ["two"] * 10) == 0
    assert vqa_accuracy("two", ["two"] * 10) == 1
    assert vqa_accuracy("2", ["two"] * 9 + ["three"]) == 1


def leave_one_out(prediction, answers):
    """Compute the rule of the paper: the mean of min(matches / 3, 1) over the subsets without one annotator."""
    scores = []
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        scores.append(min(others.count(prediction) / 3, 1))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("number", [2, 3, 4, 10])
def test_the_score_is_the_mean_over_leave_one_out_subsets(number):
    for matches in range(number + 1):
        answers = ["red"] * matches + [f"other{place}" for place in range(number - matches)]
        assert vqa_accuracy("red", answers) == pytest.approx(leave_one_out("red", answers), abs=1e-12)


@pytest.mark.parametrize(
    "prediction, answer, score",
    [
        ("red", "blue", 0),
        ("The two.", "2", 1),
        ("2", "two", 1),
        ("50%", "50", 0),
        ("C#", "C", 0),
        ("cafe", "café", 0),
        ("cafe\u0301", "café", 1),
        # Nothing is left of these.
        ("-", "-", 1),
        ("-", "...", 0),
        ("The", "the", 1),
        ("the", "a", 0),
    ],
)
def test_a_single_answer_is_exact_match(prediction, answer, score):
    assert exact_match(prediction, answer) == answer_score(prediction, [answer]) == score


def test_no_answers_or_predictions_are_an_error():
    with pytest.raises(ValueError, match="'red'"):
        answer_score("red", [])
    with pytest.raises(ValueError):
        VqaAccuracy().compute(predictions=[], references=[])


MODULE = str(EXAMPLES / "metrics/vqa_accuracy.py")
PREDICTIONS = ["red", "yes", "Two", "yes"]
REFERENCES = [["red"] * 2 + ["blue"] * 8, ["yes"], ["2"], ["no"]]


@pytest.mark.parametrize("load", [VqaAccuracy, partial(evaluate.load, MODULE)], ids=["import", "load"])
def test_metric(load):
    metric = load()
    assert metric.compute(predictions=PREDICTIONS, references=REFERENCES) == {
        "accuracy": pytest.approx(2.6 / 4),
        "vqa_accuracy": pytest.approx(0.6),
        "exact_match": pytest.approx(2 / 3),
    }
