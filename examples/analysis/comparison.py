"""Comparison of two models on the same items: accuracy by group, changed answers and significance."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from scipy.stats import false_discovery_control

from modeling_trips.modeling_trips_grounding import paired_box_iou
from trips_examples.analysis.paired import exact_sign_test
from trips_examples.metrics.grounding_accuracy import REFCOCO_IOU
from trips_examples.metrics.vqa_accuracy import answer_score, most_common_answer


TEXT_COLUMNS = ("question", "expression", "statement", "caption")
LENGTHS = ((4, "1 to 4 words"), (8, "5 to 8 words"), (12, "9 to 12 words"))
SIZES = ((1 / 64, "up to 1/64"), (1 / 16, "up to 1/16"), (1 / 4, "up to 1/4"))
PLACES = (("top left", "top", "top right"), ("left", "middle", "right"), ("bottom left", "bottom", "bottom right"))


@dataclass(frozen=True)
class Item:
    """
    A row with the predictions of both models.

    Args:
        source (`str`), text (`str`): origin and text of the row.
        truth, prediction, other_prediction (`str`)
        score, other_score (`float`): scores of the predictions, in [0, 1].
        groups (`dict[str, str]`): value of the row by feature.
    """

    source: str
    text: str
    truth: str
    prediction: str
    other_prediction: str
    score: float
    other_score: float
    groups: dict[str, str] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        return self.score > 0.5

    @property
    def other_is_right(self) -> bool:
        return self.other_score > 0.5


@dataclass(frozen=True)
class Group:
    """
    Items with the same value of a feature.

    Args:
        feature, value (`str`)
        count (`int`): number of items.
        accuracy, other_accuracy (`float`): mean scores.
        lost, won (`int`): number of items that only the other model, and only this model, gets right.
        p_value (`float`): p value of McNemar's exact test, two-sided.
        q_value (`float`): p value corrected for the number of groups (Benjamini and Hochberg).
    """

    feature: str
    value: str
    count: int
    accuracy: float
    other_accuracy: float
    lost: int
    won: int
    p_value: float
    q_value: float

    @property
    def difference(self) -> float:
        return self.accuracy - self.other_accuracy


@dataclass(frozen=True)
class Comparison:
    """Comparison of all items, of `groups` (largest loss first), and single `items`."""

    overall: Group
    groups: list[Group]
    items: list[Item]

    @property
    def changed(self) -> list[Item]:
        return [item for item in self.items if item.is_right != item.other_is_right]

    def lost_in(self, group: Group) -> list[Item]:
        """Return the items of a group that only the other model gets right."""
        lost = [item for item in self.changed if item.other_is_right]
        return [item for item in lost if item.groups.get(group.feature) == group.value]


# Items


def score_of(row: dict) -> float:
    """
    Return the score of a line of `predictions.jsonl`, or of retrieval's `found_images.jsonl`, by the metric of its
    task.

    Raises:
        ValueError: The task has no right and wrong answers, as captioning.
    """
    if "answers" in row:
        return answer_score(row["prediction"], row["answers"])
    if "box" in row:
        boxes = (torch.tensor([row[column]], dtype=torch.float64) for column in ("prediction", "box"))
        return float(paired_box_iou(*boxes).item() >= REFCOCO_IOU)
    if "label" in row:
        return float(row["prediction"] == row["label"])
    if "first_right" in row:
        return float(row["first_right"] == 1)
    raise ValueError(f"A prediction with {', '.join(row)} cannot be right or wrong. Give predictions of another task.")


def text_of(row: dict) -> str:
    return next(row[column] for column in TEXT_COLUMNS if column in row)


def key_of(row: dict) -> tuple[str, str]:
    """Return the key that identifies a row in its data set and in predictions."""
    return row["source"], text_of(row)


def join(rows: Sequence[dict], others: Sequence[dict], features: dict[tuple[str, str], dict] | None = None):
    """
    Join the predictions of two models.

    Args:
        rows, others (`Sequence[dict]`): lines of the models' `predictions.jsonl`.
        features (`dict`, *optional*): further groups of each row, by key.

    Returns:
        `list[Item]`, in the order of `rows`.

    Raises:
        ValueError: The predictions belong to different items.
    """
    by_key = {key_of(row): row for row in others}
    if missing := [key for key in map(key_of, rows) if key not in by_key] or by_key.keys() - set(map(key_of, rows)):
        source, text = next(iter(missing))
        raise ValueError(
            f"The predictions belong to different items: {len(missing)} are in one file only, such as {text!r} "
            f"({source}). Evaluate both models on the same data."
        )
    items = []
    for row in rows:
        other, key = by_key[key_of(row)], key_of(row)
        groups = {**groups_of(row), **(features or {}).get(key, {})}
        words = (_truth(row), _words(row), _words(other))
        items.append(Item(row["source"], text_of(row), *words, score_of(row), score_of(other), groups))
    return items


def _truth(row: dict) -> str:
    if "answers" in row:
        return most_common_answer(row["answers"])
    return str(row.get("box", row.get("label", "its own image")))


def _words(row: dict) -> str:
    return f"found at place {row['first_right']}" if "first_right" in row else str(row["prediction"])


def groups_of(row: dict) -> dict[str, str]:
    """Return the groups of a row from its prediction. A question without a kind is grouped by its first words."""
    words = text_of(row).lower().split()
    groups = {"length of the text": _up_to(len(words), LENGTHS, "13 words and more")}
    if row.get("kind"):
        groups["kind"] = row["kind"]
    else:
        groups["first words"] = " ".join(words[:2])
    if row.get("answer_type"):
        groups["type of the answer"] = row["answer_type"]
    if "answers" in row or "label" in row:
        groups["answer"] = _truth(row)
    return groups


def groups_of_region(region: Sequence[float], size: tuple[int, int]) -> dict[str, str]:
    """Return the groups by size and place of a box (x0, y0, x1, y1) in an image of (height, width)."""
    x0, y0, x1, y1 = region
    height, width = size
    share = (x1 - x0) * (y1 - y0) / (height * width)
    row, column = (min(2, int(3 * (a + b) / (2 * side))) for a, b, side in ((y0, y1, height), (x0, x1, width)))
    return {
        "size, as a share of the image": _up_to(share, SIZES, "more than 1/4"),
        "place in the image": PLACES[row][column],
    }


def _up_to(number: float, bounds: Iterable[tuple[float, str]], beyond: str) -> str:
    return next((name for bound, name in bounds if number <= bound), beyond)


# Statistics


def compare(items: list[Item], min_count: int = 10) -> Comparison:
    """
    Compare both models on all items, and on each group of at least `min_count` items. Groups are ordered by the
    significance of their loss.
    """
    by_group = defaultdict(list)
    for item in items:
        for group in item.groups.items():
            by_group[group].append(item)
    members = {group: of_group for group, of_group in by_group.items() if len(of_group) >= min_count}
    p_values = [mcnemar(of_group) for of_group in members.values()]
    q_values = false_discovery_control(p_values).tolist() if p_values else []
    groups = [_group(*name, of_group, p, q) for (name, of_group), p, q in zip(members.items(), p_values, q_values)]
    p = mcnemar(items)
    groups.sort(key=lambda group: (group.difference >= 0, group.q_value, group.difference))
    return Comparison(_group("all", "", items, p, p), groups, items)


def mcnemar(items: list[Item]) -> float:
    """Return the p value of McNemar's exact test."""
    return exact_sign_test(*_changes(items))


def _changes(items: list[Item]) -> tuple[int, int]:
    lost = sum(item.other_is_right and not item.is_right for item in items)
    return lost, sum(item.is_right and not item.other_is_right for item in items)


def _group(feature: str, value: str, items: list[Item], p: float, q: float) -> Group:
    score = sum(item.score for item in items) / len(items)
    other_score = sum(item.other_score for item in items) / len(items)
    return Group(feature, value, len(items), score, other_score, *_changes(items), p, q)
