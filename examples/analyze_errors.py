r"""
Compare two models on the same items: accuracy by group, changed answers, and McNemar's exact test.

    python examples/analyze_errors.py --model outputs/pruned --other outputs/unpruned --validation_file val.jsonl
    python examples/analyze_errors.py --model outputs/pruned      # against the same weights at keep rate 1.0
    python examples/analyze_errors.py --task grounding --model outputs/text --other outputs/image
    python examples/analyze_errors.py --model a/predictions.jsonl --other b/predictions.jsonl  # runs no model

All other options (--validation_file, --image_root, --max_eval_samples, ...) are passed to the task's script, which
runs the models. The weights of a pruned model were not trained for keep rate 1.0: to measure the cost of pruning, give
a model that was trained unpruned with the same information as --other.
"""

import trips_examples  # noqa: F401  # isort: skip

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trips_examples import run_grounding, run_nlvr2, run_retrieval, run_vqa
from trips_examples.analysis import SAME_WEIGHTS, SAME_WEIGHTS_NOTE
from trips_examples.analysis.comparison import Group, compare, draw_groups, join
from trips_examples.training.files import write_json
from trips_examples.training.parser import make_parser, run_script


# Script of each task, and its file of predictions.
TASKS = {
    "vqa": (run_vqa.main, "predictions.jsonl"),
    "grounding": (run_grounding.main, "predictions.jsonl"),
    "nlvr2": (run_nlvr2.main, "predictions.jsonl"),
    "retrieval": (run_retrieval.main, "found_images.jsonl"),
}


@dataclass
class AnalyzeArguments:
    model: str = field(metadata={"help": "Checkpoint (folder or name on the Hub), or a file of its predictions."})
    other: str | None = field(
        default=None,
        metadata={"help": "Model to compare with, as --model. Default: the same weights at keep rate 1.0."},
    )
    task: str = field(default="vqa", metadata={"help": "Task of the models.", "choices": list(TASKS)})
    output_dir: str = field(default="outputs/errors", metadata={"help": "Folder for errors.json and errors.png."})
    min_count: int = field(default=10, metadata={"help": "Smallest number of items of a group."})

    def __post_init__(self):
        if self.other is None and self.model.endswith(".jsonl"):
            raise ValueError(f"--model {self.model} is a file of predictions. Give the other model with --other.")


def predictions_of(name: str, task: str, folder: Path, options: list[str]) -> tuple[list[dict], str]:
    """
    Return the predictions in a file, or those of a checkpoint for the data of `options`, and what the training used
    regions for.
    """
    main, file = TASKS[task]
    path = Path(name) if name.endswith(".jsonl") else folder / file
    if not name.endswith(".jsonl"):
        only_evaluate = ["--do_train", "False", "--do_predict", "False"]
        main(["--model", name, *only_evaluate, "--output_dir", str(folder), *options])
    results = path.with_name("eval_results.json")
    record = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return rows, record.get("regions_used_for", "unknown")


def main(argv: list[str] | None = None) -> tuple[Group, list[Group]]:
    parser = make_parser(AnalyzeArguments, description=__doc__)
    args, options = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    output = Path(args.output_dir)
    names = (args.model, args.other or SAME_WEIGHTS)
    rows, regions = predictions_of(args.model, args.task, output / "model", options)
    others = [*options, *([] if args.other else ["--keep_rate", "1.0"])]
    other_rows, other_regions = predictions_of(args.other or args.model, args.task, output / "other", others)
    items = join(rows, other_rows)
    overall, groups = compare(items, args.min_count)
    report = {
        "models": [{"name": name, "regions_used_for": used} for name, used in zip(names, (regions, other_regions))],
        "overall": asdict(overall),
        "groups": [asdict(group) for group in groups],
        "changed": [asdict(item) for item in items if item.change],
    }
    write_json(output / "errors.json", report)
    draw_groups(groups, names, output / "errors.png")
    print(f"{names[0]}: {overall.accuracy:.2%}, {names[1]}: {overall.other_accuracy:.2%}. {overall.verdict}")
    print(f"Regions in training: {regions}; of the other model: {other_regions}.")
    if regions != other_regions:
        print("The models were not trained with the same information.")
    if args.other is None:
        print(SAME_WEIGHTS_NOTE)
    for group in groups[:5]:
        print(f"  {group.difference:+.1%} of {group.count}, q = {group.q_value:.2g}  {group.feature}: {group.value}")
    print(f"Report: {output / 'errors.json'}, {output / 'errors.png'}")
    return overall, groups


if __name__ == "__main__":
    run_script(main)
