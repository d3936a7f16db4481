"""Accuracy by the kind of text and by the size of its target region."""

import evaluate
import torch
from datasets import Dataset

from trips_examples.data.images import column_of
from trips_examples.metrics.selection import REGION_COLUMNS


SIZES = ("smallest", "medium", "largest")


def groups_of(rows: Dataset) -> dict[str, list[int]]:
    """
    Return the indices of the rows of each known `kind`, of each known `wording`, and of the thirds with the smallest,
    medium and largest boxes. Rows without a column `kind` have no groups.
    """
    if "kind" not in rows.column_names:
        return {}
    groups: dict[str, list[int]] = {}
    for place, kind in enumerate(column_of(rows, "kind")):
        if kind is not None:
            groups.setdefault(kind, []).append(place)
    for place, wording in enumerate(column_of(rows, "wording") if "wording" in rows.column_names else ()):
        if wording is not None:
            groups.setdefault(f"{wording}_wording", []).append(place)
    column = next(column for column in REGION_COLUMNS if column in rows.column_names)
    areas = {place: (box[2] - box[0]) * (box[3] - box[1]) for place, box in enumerate(column_of(rows, column)) if box}
    thirds = torch.tensor(sorted(areas, key=areas.__getitem__), dtype=torch.long).tensor_split(3)
    return dict(sorted(groups.items())) | {name: third.tolist() for name, third in zip(SIZES, thirds) if len(third)}


def accuracy_by_group(metric: evaluate.Metric, predictions: list, references: list, rows: Dataset) -> dict[str, float]:
    """Return the accuracy on each of `groups_of(rows)`, as `eval_accuracy_{group}`."""
    results = {}
    for name, places in groups_of(rows).items():
        results[f"eval_accuracy_{name}"] = metric.compute(
            predictions=[predictions[place] for place in places], references=[references[place] for place in places]
        )["accuracy"]
    return results
