"""
Metrics in the Hub's format, `.eval_results/*.yaml`, for model pages and leaderboards.
"""

from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from .model_card import CardArguments, read_metrics


def write_eval_results(target: Path, results: Path, args: CardArguments):
    """
    Write a file for the evaluation data with an entry per metric. Nothing is written for data that are not on the Hub,
    because entries need the id of the data.
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
    folder = target / ".eval_results"
    folder.mkdir()
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    (folder / f"{dataset.hub_id.replace('/', '__')}.yaml").write_text(text, encoding="utf-8")
