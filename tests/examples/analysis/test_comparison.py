"""Comparison of two models: groups and tests by hand."""

import PIL.Image
import pytest

from trips_examples.analysis.comparison import Item, compare, draw_groups, groups_of, join, score_of


def row(number: int, answer: str, prediction: str, question: str = "what is it?", **columns) -> dict:
    fields = {"question": question, "answers": [answer], "prediction": prediction}
    return {"source": f"rows.jsonl row {number}", **fields, **columns}


def pair(right: str, lost: int, won: int, same: int, **columns) -> tuple[list[dict], list[dict]]:
    """Return rows of two models: `lost` items, `won` items, and items that both get right."""
    outcomes = [("x", right)] * lost + [(right, "x")] * won + [(right, right)] * same
    numbers = range(100 * len(right), 100 * len(right) + 100)
    rows = [row(number, right, own, **columns) for number, (own, _) in zip(numbers, outcomes)]
    others = [row(number, right, other, **columns) for number, (_, other) in zip(numbers, outcomes)]
    return rows, others


def test_groups_are_in_the_order_of_their_losses(tmp_path):
    outcomes = {"red": (12, 0, 88), "blue": (4, 0, 6), "green": (0, 6, 4), "purple": (0, 0, 10)}
    pairs = [pair(name, *counts, kind=name) for name, counts in outcomes.items()]
    rows, others = (sum(parts, []) for parts in zip(*pairs))
    items = join(rows, others)
    overall, groups = compare(items)
    kinds = [group for group in groups if group.feature == "kind"]
    assert [group.value for group in kinds] == ["red", "blue", "green", "purple"]
    assert [group.difference for group in kinds] == pytest.approx([-0.12, -0.4, 0.6, 0.0])
    assert (kinds[0].count, kinds[0].lost, kinds[0].won) == (100, 12, 0)
    assert (kinds[0].accuracy, kinds[0].other_accuracy) == (0.88, 1.0)
    assert kinds[0].p_value == pytest.approx(2 / 2**12) and kinds[3].p_value == 1.0
    assert (overall.count, overall.lost, overall.won) == (130, 16, 6)
    assert sum(item.change != 0 for item in items) == 22
    # Kind and answer have the same items and share the first two ranks of Benjamini and Hochberg.
    assert kinds[0].q_value == pytest.approx(kinds[0].p_value * len(groups) / 2)
    draw_groups(groups, ("a", "b"), tmp_path / "errors.png")
    assert len(PIL.Image.open(tmp_path / "errors.png").convert("RGB").getcolors(10**6)) > 5


def test_small_groups_are_left_out(tmp_path):
    items = join(*pair("red", 2, 1, 3))
    assert {group.count for group in compare(items, min_count=6)[1]} == {6}
    overall, groups = compare(items, min_count=7)
    assert groups == [] and overall.count == 6
    draw_groups(groups, ("a", "b"), tmp_path / "errors.png")


def test_predictions_of_other_items_are_refused():
    rows, others = pair("red", 1, 1, 3)
    for own, other in ((rows, others[1:]), (rows[1:], others)):
        with pytest.raises(ValueError, match=r"1 .*'what is it\?'"):
            join(own, other)


@pytest.mark.parametrize(
    ("columns", "score"),
    [
        ({"answers": ["two"], "prediction": "2"}, 1.0),
        ({"answers": ["a", "a", "b", "c"], "prediction": "b"}, 0.25),
        ({"box": [0, 0, 10, 10], "prediction": [0, 0, 10, 5]}, 1.0),
        ({"box": [0, 0, 1000, 10], "prediction": [0, 0, 499, 10]}, 0.0),
        ({"label": 0, "prediction": 1, "probability": 0.7}, 0.0),
        ({"caption": "a cat", "found": ["7"], "first_right": 1}, 1.0),
    ],
)
def test_each_task_has_its_rule(columns, score):
    assert score_of({"source": "row 1", **columns}) == pytest.approx(score)


def test_captions_are_neither_right_nor_wrong():
    with pytest.raises(ValueError, match="source, captions, prediction"):
        score_of({"source": "row 1", "captions": ["a"], "prediction": "a"})


@pytest.mark.parametrize(("score", "change"), [(0.0, 0), (0.5, 0), (0.51, 1), (1.0, 1)])
def test_more_than_half_of_a_score_is_right(score, change):
    assert Item("row 1", "what is it?", "a", "b", "c", score, 0.25, {}).change == change
    assert Item("row 1", "what is it?", "a", "b", "c", 0.25, score, {}).change == -change


def test_a_question_is_grouped_by_its_kind_or_its_first_words():
    known = groups_of(row(1, "Red.", "red", kind="what color", answer_type="other"))
    assert known == {"kind": "what color", "type of the answer": "other", "answer": "red", "words": "3"}
    free = groups_of(row(1, "yes", "no", question="Is there a red circle in the middle of it all?"))
    assert free == {"first words": "is there", "answer": "yes", "words": "10 and more"}
