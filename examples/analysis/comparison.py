"""Comparison of two models on the same items: accuracy by group, changed answers, significance, and a figure."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from scipy.stats import false_discovery_control

from modeling_trips.inspection.files import whole_file
from modeling_trips.modeling_trips_grounding import paired_box_iou
from trips_examples.analysis.paired import exact_sign_test
from trips_examples.metrics.grounding_accuracy import REFCOCO_IOU
from trips_examples.metrics.vqa_accuracy import answer_score, most_common_answer


TEXT_COLUMNS = ("question", "expression", "statement", "caption")
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Item:
    """
    A row with the predictions of both models.

    Args:
        source, text, truth, prediction, other_prediction (`str`): The row and the models' predictions.
        score, other_score (`float`): Scores of the predictions, in [0, 1]. Above 0.5, a prediction is right.
        groups (`dict[str, str]`): Value of the row by feature.
    """

    source: str
    text: str
    truth: str
    prediction: str
    other_prediction: str
    score: float
    other_score: float
    groups: dict[str, str]

    @property
    def change(self) -> int:
        """1 if only this model is right, -1 if only the other one is, otherwise 0."""
        return int(self.score > 0.5) - int(self.other_score > 0.5)


@dataclass(frozen=True)
class Group:
    """
    Items with the same value of a feature.

    Args:
        feature, value (`str`)
        count (`int`): Number of items.
        accuracy, other_accuracy (`float`): Mean scores.
        lost, won (`int`): Number of items that only the other model, and only this model, gets right.
        p_value (`float`): P value of McNemar's exact test, two-sided.
        q_value (`float`): P value corrected for the number of groups (Benjamini and Hochberg).
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

    @property
    def verdict(self) -> str:
        if self.lost + self.won == 0:
            return "No item changes between right and wrong."
        word = "worse" if self.lost > self.won else "better"
        outcome = f"{word} by more than chance" if self.p_value < SIGNIFICANT else "no more than chance would give"
        return f"{self.lost} items are lost and {self.won} won: {outcome} (p = {self.p_value:.2g})."


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


def groups_of(row: dict) -> dict[str, str]:
    """Return the value of a row by feature: kind or else first words, type of the answer, answer, and length."""
    words = _text(row).lower().split()
    groups = {"kind": row["kind"]} if row.get("kind") else {"first words": " ".join(words[:2])}
    if row.get("answer_type"):
        groups["type of the answer"] = row["answer_type"]
    if "answers" in row or "label" in row:
        groups["answer"] = _truth(row)
    return {**groups, "words": str(len(words)) if len(words) < 10 else "10 and more"}


def join(rows: Sequence[dict], others: Sequence[dict]) -> list[Item]:
    """
    Join the predictions of two models, in the order of `rows`.

    Args:
        rows, others (`Sequence[dict]`): Lines of the models' `predictions.jsonl`.

    Raises:
        ValueError: The predictions belong to different items.
    """
    own, other = ({(row["source"], _text(row)): row for row in side} for side in (rows, others))
    if missing := own.keys() ^ other.keys():
        source, text = next(iter(missing))
        raise ValueError(
            f"The predictions belong to different items: {len(missing)} are in one file only, such as {text!r} "
            f"({source}). Evaluate both models on the same data."
        )
    return [
        Item(*key, _truth(row), _words(row), _words(other[key]), score_of(row), score_of(other[key]), groups_of(row))
        for key, row in own.items()
    ]


def _text(row: dict) -> str:
    return next(row[column] for column in TEXT_COLUMNS if column in row)


def _truth(row: dict) -> str:
    if "answers" in row:
        return most_common_answer(row["answers"])
    return str(row.get("box", row.get("label", "its own image")))


def _words(row: dict) -> str:
    return f"found at place {row['first_right']}" if "first_right" in row else str(row["prediction"])


def compare(items: list[Item], min_count: int = 10) -> tuple[Group, list[Group]]:
    """
    Compare both models on all items, and on each group of at least `min_count` items. Groups with a loss come first,
    then the others, each by significance.
    """
    by_group = defaultdict(list)
    for item in items:
        for name in item.groups.items():
            by_group[name].append(item)
    groups = [_group(*name, members) for name, members in by_group.items() if len(members) >= min_count]
    q_values = false_discovery_control([group.p_value for group in groups]).tolist() if groups else []
    groups = [Group(**{**vars(group), "q_value": q}) for group, q in zip(groups, q_values)]
    groups.sort(key=lambda group: (group.difference >= 0, group.q_value, group.difference))
    return _group("all", "", items), groups


def _group(feature: str, value: str, items: list[Item]) -> Group:
    lost, won = (sum(item.change == change for item in items) for change in (-1, 1))
    accuracy, other = (mean(scores) for scores in zip(*((item.score, item.other_score) for item in items)))
    p_value = exact_sign_test(lost, won)
    return Group(feature, value, len(items), accuracy, other, lost, won, p_value, p_value)


def draw_groups(groups: Sequence[Group], names: tuple[str, str], path: str | Path, num_groups: int = 20):
    """Draw the differences of the first groups in points, with those that are significant in color."""
    groups = groups[:num_groups]
    figure = Figure(figsize=(8, 1.5 + 0.3 * len(groups)), dpi=110, layout="constrained")
    axes = figure.subplots()
    labels = [f"{group.feature}: {group.value} ({group.count})" for group in groups]
    colors = ["#d9480f" if group.q_value < SIGNIFICANT else "#adb5bd" for group in groups]
    axes.barh(range(len(groups)), [100 * group.difference for group in groups], color=colors)
    axes.set_yticks(range(len(groups)), labels)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"accuracy of {names[0]} minus {names[1]}, points (orange: q < {SIGNIFICANT})")
    with whole_file(path) as partial:
        figure.savefig(partial)
