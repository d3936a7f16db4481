"""Results of a run: files with all metrics, and the few lines that are printed at the end."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from modeling_trips.inspection import provenance
from modeling_trips.inspection.cost import forward_cost
from modeling_trips.inspection.diagnostics import advice, describe_sensitivities
from trips_examples.training.files import write_json
from trips_examples.training.schedules import as_seen
from trips_examples.training.trainer import FiniteTrainer, ImageGroupedTrainer


logger = logging.getLogger(__name__)

# The metric that sums up a task: the first of them that an evaluation has.
SCORES = {
    "accuracy": "accuracy",
    "cider": "CIDEr",
    "r_mean": "mean recall",
    "features_r_mean": "mean recall of the features",
    "region_recall": "region recall",
    "relevance_recall": "relevance recall",
}
# The score of a model that says the same about each row, and what it says.
BASELINES = {"accuracy_majority": "the most frequent answer", "accuracy_mean_box": "the mean box"}
SPLITS = {"eval": "Validation", "test": "Test"}


def facts_of(trainer: FiniteTrainer) -> dict[str, Any]:
    """Return what the training did, for its results."""
    if not isinstance(trainer, ImageGroupedTrainer):
        return {}
    return {
        "regions_used_for": trainer.regions_used_for,
        "unpruned_steps": trainer.phases.unpruned_steps,
        "schedule": str(trainer.model.config.vision_config.schedule),
    }


def save_results(trainer: FiniteTrainer, split: str, metrics: dict[str, Any], facts: dict[str, Any]):
    """
    Write the metrics of `train`, `eval` or `test` with facts and provenance to `{split}_results.json`, and add them to
    `all_results.json`. Those of an evaluation begin with its summary, which is also logged.
    """
    args = trainer.args
    if not trainer.is_world_process_zero():
        return
    results = {**metrics, **facts, "precision": args.precision, **provenance(args.device.type, args.seed)}
    if split in SPLITS:
        lines = summary(trainer, split, metrics)
        for line in lines:
            logger.info(line)
        results = {"summary": lines, **results}
    folder = Path(args.output_dir)
    write_json(folder / f"{split}_results.json", results)
    path = folder / "all_results.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {**earlier, **results})


def summary(trainer: FiniteTrainer, split: str, metrics: dict[str, Any]) -> list[str]:
    """Return the lines about an evaluation: the metric of the task, the kept patches, and what they depend on."""
    own = {name.removeprefix(f"{split}_"): value for name, value in metrics.items()}
    lines = []
    score = next((name for name in SCORES if name in own), None)
    if score is not None:
        value = f"{own[score]:.2f}" if score == "cider" else f"{own[score]:.1%}"
        line = f"{SPLITS[split]}, {own['samples']} rows: {SCORES[score]} {value}"
        for name, what in BASELINES.items():
            if name in own:
                line += f", {what} {own[name]:.1%}"
        lines.append(line)
    if not isinstance(trainer, ImageGroupedTrainer):
        return lines
    config = as_seen(trainer.model.config, trainer.processing_class)
    schedule = config.vision_config.schedule
    if not schedule.layers:
        return [*lines, "Unpruned: all patches are kept."]
    num_patches = math.prod(config.vision_config.grid_size)
    cost = forward_cost(config, text_length=1)
    lines.append(f"{schedule} keeps {cost.num_kept} of {num_patches} patches.")
    last = f"layer{schedule.layers[-1]}"
    text_sensitivity = own.get(f"{last}_text_sensitivity")
    image_sensitivity = own.get(f"{last}_image_sensitivity")
    lines += describe_sensitivities(text_sensitivity, image_sensitivity)
    if text_sensitivity is not None and beats_baseline(own):
        lines += advice(schedule, text_sensitivity)
    return lines


def beats_baseline(metrics: dict[str, float]) -> bool:
    """Return whether the accuracy is above that of `BASELINES` by more than chance, of which 1/sqrt(rows) is ample."""
    margin = 1 / math.sqrt(metrics["samples"])
    return any(name in metrics and metrics["accuracy"] > metrics[name] + margin for name in BASELINES)


def print_summary(trainer: FiniteTrainer, metrics: dict[str, Any]):
    """Print the summary of the last evaluation and the metric of others, where the rest is, and what to type next."""
    folder = trainer.args.output_dir
    evaluated = [split for split in SPLITS if any(name.startswith(f"{split}_") for name in metrics)]
    for split in evaluated[:-1]:
        print(*summary(trainer, split, metrics)[:1], sep="\n")
    for split in evaluated[-1:]:
        print(*summary(trainer, split, metrics), sep="\n")
        print(f"All metrics: {Path(folder, f'{split}_results.json')}")
    if trainer.args.do_train:
        print(f"Model, predictions and training.png: {folder}")
        command = f"push_to_hub.py --model {folder} --repo_id NAME/MODEL --dry_run"
        if type(trainer.model).__name__ == "TripsForQuestionAnswering":
            command = f"ask.py --model {folder} --image IMAGE --question QUESTION"
        print(f"Next: python examples/{command}")
