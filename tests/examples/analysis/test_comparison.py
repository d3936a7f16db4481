"""Comparison of two models: groups and tests by hand."""

import pytest

from trips_examples.analysis.comparison import Item, compare, groups_of, groups_of_region, join, score_of


def row(number: int, answer: str, prediction: str, question: str = "what is it?", **columns) -> dict:
    return {
        "source": f"rows.jsonl row {number}",
        "question_id": str(number),
        "question": question,
        "answers": [answer],
        "prediction": prediction,
        **columns,
    }


def pair(right: str, lost: int, won: int, same: int, **columns) -> tuple[list[dict], list[dict]]:
    """Return rows of two models: `lost` items, `won` items, and items that both get right."""
    outcomes = [("x", right)] * lost + [(right, "x")] * won + [(right, right)] * same
    numbers = range(100 * len(right), 100 * len(right) + 100)
    rows = [row(number, right, own, **columns) for number, (own, _) in zip(numbers, outcomes)]
    others = [row(number, right, other, **columns) for number, (_, other) in zip(numbers, outcomes)]
    return rows, others


def test_groups_are_in_the_order_of_their_losses():
    """Groups with a significant loss come first, then other losses, then the rest, each ordered by q value."""
    outcomes = {"red": (12, 0, 88), "blue": (4, 0, 6), "green": (0, 6, 4), "purple": (0, 0, 10)}
    pairs = [pair(name, *counts, kind=name) for name, counts in outcomes.items()]
    rows, others = (sum(parts, []) for parts in zip(*pairs))
    result = compare(join(rows, others))
    kinds = [group for group in result.groups if group.feature == "kind"]
    assert [group.value for group in kinds] == ["red", "blue", "green", "purple"]
    assert [group.difference for group in kinds] == pytest.approx([-0.12, -0.4, 0.6, 0.0])
    assert (kinds[0].count, kinds[0].lost, kinds[0].won) == (100, 12, 0)
    assert (kinds[0].accuracy, kinds[0].other_accuracy) == (0.88, 1.0)
    assert kinds[0].p_value == pytest.approx(2 / 2**12) and kinds[3].p_value == 1.0
    assert len(result.changed) == 22 and len(result.lost_in(kinds[0])) == 12
    # Kind and answer have the same items and share the first two ranks of Benjamini and Hochberg.
    assert kinds[0].q_value == pytest.approx(kinds[0].p_value * len(result.groups) / 2)


def test_small_groups_are_left_out():
    items = join(*pair("red", 2, 1, 3))
    assert {group.count for group in compare(items, min_count=6).groups} == {6}
    result = compare(items, min_count=7)
    assert result.groups == [] and result.overall.count == 6


def test_predictions_of_other_items_are_refused():
    rows, others = pair("red", 1, 1, 3)
    with pytest.raises(ValueError, match=r"'what is it\?'"):
        join(rows, others[1:])
    with pytest.raises(ValueError, match="items"):
        join(rows[1:], others)


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


@pytest.mark.parametrize(("score", "is_right"), [(0.0, False), (0.5, False), (0.51, True), (1.0, True)])
def test_more_than_half_of_a_score_is_right(score, is_right):
    item = Item("row 1", "what is it?", "a", "b", "c", score, 0.25)
    assert (item.is_right, item.other_is_right) == (is_right, False)
    other = Item("row 1", "what is it?", "a", "b", "c", 0.25, score)
    assert (other.is_right, other.other_is_right) == (False, is_right)


def test_captions_are_neither_right_nor_wrong():
    with pytest.raises(ValueError, match="source, captions, prediction"):
        score_of({"source": "row 1", "captions": ["a"], "prediction": "a"})


def test_a_question_is_grouped_by_its_kind_or_its_first_words():
    known = groups_of(row(1, "Red.", "red", kind="what color", answer_type="other"))
    assert known == {
        "length of the text": "1 to 4 words",
        "kind": "what color",
        "type of the answer": "other",
        "answer": "red",
    }
    free = groups_of(row(1, "yes", "no", question="Is there a red circle here?"))
    assert free == {"length of the text": "5 to 8 words", "first words": "is there", "answer": "yes"}


def test_lengths_include_their_bounds():
    lengths = {4: "1 to 4 words", 5: "5 to 8 words", 8: "5 to 8 words", 12: "9 to 12 words", 13: "13 words and more"}
    for words, group in lengths.items():
        assert groups_of(row(1, "a", "a", question="word " * words))["length of the text"] == group


@pytest.mark.parametrize(
    ("box", "image_size", "size", "place"),
    [
        ([0, 0, 10, 10], (100, 100), "up to 1/64", "top left"),
        ([40, 40, 60, 60], (100, 100), "up to 1/16", "middle"),
        ([0, 0, 100, 100], (100, 100), "more than 1/4", "middle"),
        ([60, 20, 100, 50], (50, 200), "up to 1/4", "bottom"),
    ],
)
def test_size_and_place_of_a_region(box, image_size, size, place):
    groups = groups_of_region(box, image_size)
    assert groups == {"size, as a share of the image": size, "place in the image": place}
