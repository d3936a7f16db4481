"""
Measured metrics in the Hub's own form, `.eval_results/*.yaml`, from which model pages and the leaderboards of data
sets are made; beside `model-index` in the card.
"""

from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from .model_card import CardArguments, read_metrics


FOLDER = ".eval_results"


def write_eval_results(target: Path, results: Path, args: CardArguments):
    """
    Writes one file for the data set that the metrics in `results` were measured on, with an entry for each of them:
    its task is the metric, as the board of a data set has one number for each of its tasks. Nothing is written for a
    data set that is not on the Hub, as an entry names it by its id there.
    """
    dataset = args.evaluated_on
    if dataset is None or dataset.hub_id is None:
        return
    metrics, num_examples = read_metrics(results)
    notes = [f"split {args.eval_split}"] if args.eval_split else []
    notes += [f"{num_examples:,} examples"] if num_examples else []
    entries = [
        EvalResultEntry(dataset_id=dataset.hub_id, task_id=metric, value=value, notes=", ".join(notes) or None)
        for metric, value in metrics.items()
    ]
    folder = target / FOLDER
    folder.mkdir()
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    (folder / f"{dataset.hub_id.replace('/', '__')}.yaml").write_text(text, encoding="utf-8")
