r"""
Compare two models on the same items: accuracy by group, changed answers, significance, and the kept patches in the
groups with the largest loss. The report is a self-contained HTML page and JSON.

    python examples/analyze_errors.py --model outputs/pruned      # against the same weights at keep rate 1.0
    python examples/analyze_errors.py --model outputs/pruned --other outputs/unpruned --dataset_name easy_vqa_scenes
    python examples/analyze_errors.py --task grounding --model outputs/text --other outputs/image
    python examples/analyze_errors.py --model a/predictions.jsonl --other b/predictions.jsonl  # runs no model

All other options (--validation_file, --image_root, --max_eval_samples, ...) are passed to the task's script, which
runs the models. Files of predictions are joined with the data only if one of these options is given. Without the data
there are no groups by size and place, and no drawings.

The weights of a pruned model were not trained for keep rate 1.0. To measure the cost of pruning, give an unpruned
baseline as --other.
"""

import trips_examples  # noqa: F401  # isort: skip

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import HfArgumentParser, TrainingArguments

from modeling_trips import TripsProcessor
from modeling_trips.inspection.checkpoints import load_checkpoint
from trips_examples import run_grounding, run_nlvr2, run_retrieval, run_vqa
from trips_examples.analysis import SAME_WEIGHTS, SAME_WEIGHTS_NOTE
from trips_examples.analysis.comparison import Comparison, Group, compare, join, key_of
from trips_examples.analysis.page import as_json, render, verdict
from trips_examples.analysis.pictures import draw_row, features_of
from trips_examples.data.collators import ImageBatchCollator
from trips_examples.data.loading import load_task_dataset
from trips_examples.data.rows import without_decoding
from trips_examples.data.task_collators import GroundingCollator, Nlvr2Collator, RetrievalCollator, VqaCollator
from trips_examples.training.files import write_json, write_whole
from trips_examples.training.options import DataArguments, ModelArguments
from trips_examples.training.parser import make_parser, run_script


@dataclass(frozen=True)
class AnalyzedTask:
    run: Callable[[list[str]], dict]
    data: str
    collator: type[ImageBatchCollator]
    predictions: str = "predictions.jsonl"


TASKS = {
    "vqa": AnalyzedTask(run_vqa.main, "vqa", VqaCollator),
    "grounding": AnalyzedTask(run_grounding.main, "grounding", GroundingCollator),
    "nlvr2": AnalyzedTask(run_nlvr2.main, "nlvr2", Nlvr2Collator),
    "retrieval": AnalyzedTask(run_retrieval.main, "captions", RetrievalCollator, "found_images.jsonl"),
}


MOST_GROUPS = 4  # groups with drawings


@dataclass
class AnalyzeArguments:
    model: str = field(metadata={"help": "Checkpoint (folder or name on the Hub), or a file of its predictions."})
    other: str | None = field(
        default=None,
        metadata={"help": "Model to compare with, as --model. Default: the same weights at keep rate 1.0."},
    )
    task: str = field(default="vqa", metadata={"help": "Task of the models.", "choices": list(TASKS)})
    output_dir: str = field(default="outputs/errors", metadata={"help": "Folder for errors.html and errors.json."})
    min_count: int = field(default=10, metadata={"help": "Smallest number of items of a group."})
    num_pictures: int = field(default=3, metadata={"help": "Number of items to draw for each of the worst groups."})

    def __post_init__(self):
        if self.other is None and is_file(self.model):
            raise SystemExit(f"--model {self.model} is a file of predictions. Give the other model with --other.")


def is_file(name: str) -> bool:
    return name.endswith(".jsonl")


def predictions_of(name: str, task: AnalyzedTask, folder: Path, options: list[str]) -> list[dict]:
    """Return the predictions in a file, or those of a checkpoint for the data of `options`."""
    path = Path(name)
    if not is_file(name):
        only_evaluate = ["--do_train", "False", "--do_predict", "False"]
        task.run(["--model_name_or_path", name, *only_evaluate, "--output_dir", str(folder), *options])
        path = folder / task.predictions
    if not path.is_file():
        raise SystemExit(f"The file of predictions {path} does not exist.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@dataclass
class SeedArguments:
    seed: int = field(default=TrainingArguments.seed, metadata={"help": "Seed of the scenes, as in training."})


def parsed(options: list[str]) -> tuple[DataArguments, ModelArguments, SeedArguments]:
    """Parse the options of data and model, and ignore the others."""
    parser = HfArgumentParser((DataArguments, ModelArguments, SeedArguments))
    *args, _ = parser.parse_args_into_dataclasses(options, return_remaining_strings=True)
    return tuple(args)


def draw_worst(
    comparison: Comparison, dataset: Dataset, args: AnalyzeArguments, model_args: ModelArguments
) -> list[tuple[Group, list]]:
    """Return the groups with the largest loss, and drawings of kept patches of some of their lost items."""
    model = load_checkpoint(args.model, **model_args.config_overrides()).base_model
    collator = TASKS[args.task].collator(TripsProcessor.from_pretrained(args.model))
    rows = {key_of(row): number for number, row in enumerate(dataset)}
    worst = [group for group in comparison.groups if group.difference < 0][:MOST_GROUPS]
    lost = {group: comparison.lost_in(group)[: args.num_pictures] for group in worst}
    return [
        (group, [(item, draw_row(dataset[rows[item.source, item.text]], model, collator)) for item in items])
        for group, items in lost.items()
    ]


def main(argv: list[str] | None = None) -> Comparison:
    parser = make_parser(AnalyzeArguments, description=__doc__)
    args, options = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    task, output = TASKS[args.task], Path(args.output_dir)
    names = (args.model, args.other or SAME_WEIGHTS)
    note = SAME_WEIGHTS_NOTE if args.other is None else None
    predictions = predictions_of(args.model, task, output / "model", options)
    keep_rate = [] if args.other is not None else ["--keep_rate", "1.0"]
    others = predictions_of(args.other or args.model, task, output / "other", [*options, *keep_rate])
    features, dataset = {}, None
    data_args, model_args, seed_args = parsed(options)
    if options or not (is_file(args.model) and is_file(args.other or "")):
        data = load_task_dataset(task.data, data_args, seed=seed_args.seed)
        dataset = without_decoding(data["validation"])
        features = features_of(dataset)
    comparison = compare(join(predictions, others, features), args.min_count)
    is_drawn = dataset is not None and not is_file(args.model)
    worst = draw_worst(comparison, dataset, args, model_args) if is_drawn else []
    write_json(output / "errors.json", as_json(comparison, names, note))
    write_whole(output / "errors.html", render(comparison, names, worst, note=note))
    overall = comparison.overall
    print(f"{names[0]}: {overall.accuracy:.2%}, {names[1]}: {overall.other_accuracy:.2%}. {verdict(overall)}")
    if note:
        print(note)
    print(f"Report: {output / 'errors.html'}, {output / 'errors.json'}")
    return comparison


if __name__ == "__main__":
    run_script(main)
