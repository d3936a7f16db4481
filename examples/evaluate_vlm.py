r"""
Evaluate patch selection in a vision-language model on tasks of lmms-eval, beside the unpruned model and controls.

    pip install lmms-eval "filelock<4"
    python examples/evaluate_vlm.py --model llava-hf/llava-1.5-7b-hf --tasks gqa pope --batch_size 16
    python examples/evaluate_vlm.py --model Qwen/Qwen2.5-VL-3B-Instruct --tasks pope --visual_tokens 64 \
        --selections tower_image fewer_pixels --limit 500 --output_json outputs/qwen.json

Every selection keeps about the same number of visual tokens per image: inside the vision tower (`tower_image`,
`tower_text` with a trained --guide, `tower_random`), between the tower and the language model (`exit_prompt`,
`exit_random`), or by a lower resolution (`fewer_pixels`). A tower keeps a share of the patches: the number divided by
the unpruned model's mean on the task. Numbers that are not below this mean are left out.

The table has the measured mean of visual tokens per image, the score of each task in percent of the unpruned model's,
and the mean over the tasks. Each row is written to --output_json as soon as it is there; rows that are there are not
evaluated again. Run one process.
"""

import trips_examples  # noqa: F401  # isort: skip

import json
import math
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

from modeling_trips.hosts import TextGuide
from modeling_trips.hosts.vlm.families import find_family
from modeling_trips.inspection.provenance import provenance
from trips_examples.training.files import write_json
from trips_examples.training.parser import make_parser, run_script


UNPRUNED = "unpruned"
SELECTIONS = {
    "tower_image": "tower, by the image",
    "tower_text": "tower, by the text",
    "tower_random": "tower, at random",
    "exit_prompt": "exit, by the prompt",
    "exit_random": "exit, at random",
    "fewer_pixels": "lower resolution",
}
# Rows of one file agree in these.
SETTINGS = ("model", "dtype", "layer", "guide", "limit", "seed")


@dataclass
class EvaluationArguments:
    model: str = field(metadata={"help": "A vision-language model: a folder, or on the Hub."})
    tasks: list[str] = field(metadata={"help": "Tasks of lmms-eval that generate text."})
    visual_tokens: list[int] = field(
        default_factory=lambda: [576, 192, 128, 64], metadata={"help": "Numbers of visual tokens per image."}
    )
    selections: list[str] | None = field(
        default=None, metadata={"help": f"Of {', '.join(SELECTIONS)}. Default: all, tower_text with --guide."}
    )
    layer: int | None = field(
        default=None,
        metadata={"help": "Layer of the tower that selects. Default: the guide's, or a third."},
    )
    guide: str | None = field(default=None, metadata={"help": "A TextGuide of this layer: a folder, or on the Hub."})
    batch_size: int = field(default=1, metadata={"help": "Questions per step."})
    limit: int | None = field(default=None, metadata={"help": "Questions per task. Default: all."})
    device: str | None = field(default=None, metadata={"help": "Device to run on. Default: a GPU if there is one."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto, float32, bfloat16 or float16."})
    seed: int = field(default=0, metadata={"help": "Seed of random selection at the exit and of sampling."})
    include_path: str | None = field(default=None, metadata={"help": "Folder with tasks of your own."})
    output_json: str = field(default="outputs/vlm.json", metadata={"help": "File that the rows are written to."})

    def __post_init__(self):
        if self.selections is None:
            self.selections = [name for name in SELECTIONS if name != "tower_text" or self.guide is not None]
        if wrong := [name for name in self.selections if name not in SELECTIONS]:
            raise ValueError(f"--selections must be of {', '.join(SELECTIONS)}, got {', '.join(wrong)}.")
        if "tower_text" in self.selections and self.guide is None:
            raise ValueError("--selections tower_text needs a trained --guide.")
        for name in ("visual_tokens", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and min(value if isinstance(value, list) else [value]) < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")

    @property
    def settings(self) -> dict:
        return {name: getattr(self, name) for name in SETTINGS}


def default_layer(name: str, guide: str | None = None) -> int:
    """Return the layer of the guide, or a third of the selectable layers of the vision tower; 1 without any."""
    if guide is not None and (layer := TextGuide.from_pretrained(guide).layer) is not None:
        return layer
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    try:
        family = find_family(model)
    except TypeError:
        family = None
    return max(1, round(family.num_selectable_layers / 3)) if family is not None and family.layer_classes else 1


def model_arguments(selection: str, visual_tokens: int | None, keep_rate: float, args: EvaluationArguments) -> dict:
    """Return the arguments of the model `trips_vlm` for a selection."""
    if selection == UNPRUNED:
        return {}
    if selection == "fewer_pixels":
        return {"resolution_tokens": visual_tokens}
    place, scored_by = selection.split("_")
    if place == "exit":
        return {"visual_tokens": visual_tokens, "scorer": scored_by}
    guide = {"guide": args.guide} if scored_by == "text" else {}
    return {"schedule": f"{args.layer}:{scored_by}:{keep_rate}", **guide}


@cache
def task_manager(include_path: str | None):
    """Return the tasks of lmms-eval, and those in a folder."""
    from lmms_eval.tasks import TaskManager

    return TaskManager("WARNING", include_path=include_path, model_name="trips_vlm")


def evaluate(selection: dict, task: str, args: EvaluationArguments) -> dict:
    """Return the results of a task, and the mean number of visual tokens per image."""
    from lmms_eval.evaluator import simple_evaluate

    from trips_examples.lmms.vlm import TripsVlm

    start = time.perf_counter()
    try:
        model = TripsVlm(args.model, **selection, batch_size=args.batch_size, device=args.device, dtype=args.dtype)
    except (TypeError, ValueError) as error:
        if not selection:
            raise
        return {"not_supported": str(error)}
    found = simple_evaluate(
        model,
        tasks=[task],
        batch_size=args.batch_size,
        limit=args.limit,
        task_manager=task_manager(args.include_path),
        torch_random_seed=args.seed,
        log_samples=False,
        verbosity="WARNING",
        # Tasks write files for submission into this folder.
        cli_args=Namespace(output_path=str(Path(args.output_json).parent), process_with_media=False),
    )
    num_samples = sum(number["effective"] for number in found["n-samples"].values())
    if not num_samples:
        raise ValueError(f"The task {task} has no samples to evaluate.")
    return {
        "visual_tokens_per_image": model.vlm.visual_tokens_per_image,
        "results": {name: numbers_in(own) for name, own in found["results"].items()},
        "higher_is_better": found["higher_is_better"],
        "num_samples": num_samples,
        "task_versions": found["versions"],
        "lmms_eval_version": version("lmms_eval"),
        "model_commit": getattr(model.vlm.model.config, "_commit_hash", None),  # on the Hub
        "device": str(model.vlm.model.device),
        "minutes": round((time.perf_counter() - start) / 60, 2),
    }


def numbers_in(results: dict) -> dict[str, float | None]:
    """Return the numbers of a task's results. A number that is not finite, which JSON has not, is `None`."""
    numbers = {name: value for name, value in results.items() if isinstance(value, (int, float))}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def read_rows(args: EvaluationArguments) -> list[dict]:
    """Return the rows of the output file. Raise a `ValueError` if they have other settings."""
    path = Path(args.output_json)
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. Choose another --output_json.") from error
    for row in rows:
        if other := [name for name, value in args.settings.items() if row.get(name) != value]:
            found = ", ".join(f"{name} {row.get(name)}" for name in other)
            raise ValueError(f"{path} holds rows with another {found}. Choose another --output_json.")
    return rows


def make_rows(args: EvaluationArguments) -> Iterator[dict]:
    """Yield all rows, those of the unpruned model first. New ones are written before they are yielded."""
    rows = read_rows(args)
    runs: list[tuple[str, int | None, str]] = [(UNPRUNED, None, task) for task in args.tasks]
    runs += [(name, number, task) for number in args.visual_tokens for name in args.selections for task in args.tasks]
    mean_tokens: dict[str, float | None] = {}
    for selection, number, task in (bar := tqdm(runs, desc="evaluations")):
        bar.set_postfix_str(f"{task}, {selection}" + ("" if number is None else f", {number} tokens"))
        mean = mean_tokens.get(task)
        if number is not None and mean is not None and number >= mean:
            continue
        key = {"selection": selection, "visual_tokens": number, "task": task}
        row = next((row for row in rows if key.items() <= row.items()), None)
        if row is None:
            keep_rate = 1.0 if number is None or mean is None else number / mean
            arguments = model_arguments(selection, number, keep_rate, args)
            result = evaluate(arguments, task, args)
            origin = provenance(result.get("device", "cpu"), args.seed)
            row = origin | args.settings | key | {"model_args": arguments, "batch_size": args.batch_size} | result
            rows.append(row)
            write_json(args.output_json, rows)
        if selection == UNPRUNED:
            mean_tokens[task] = row["visual_tokens_per_image"]
        yield row


def score_of(row: dict) -> tuple[float | None, float | None]:
    """
    Return the task's first metric in which higher is better, and its standard error. A group of tasks without a score
    of its own has the mean of theirs. Missing values are `None`.
    """
    scores = []
    for name in [row["task"], *row["results"]]:
        own = {metric.partition(",")[0]: value for metric, value in row["results"].get(name, {}).items()}
        upward = [metric for metric, higher in row["higher_is_better"].get(name, {}).items() if higher]
        chosen = next((metric for metric in upward if own.get(metric) is not None), None)
        if chosen is not None and name == row["task"]:
            return own[chosen], own.get(f"{chosen}_stderr")
        scores += [] if chosen is None else [own[chosen]]
    return (sum(scores) / len(scores) if scores else None), None


def print_table(rows: list[dict], tasks: list[str]):
    """
    Print percent of the unpruned model's score in Markdown, with the standard error of the task's metric, and the mean
    over the tasks. In the row of the unpruned model its scores are in brackets.
    """
    done = [row for row in rows if "results" in row]
    base = {row["task"]: score_of(row)[0] for row in done if row["selection"] == UNPRUNED}
    print(f"| selection | visual tokens | mean per image | {' | '.join(tasks)} | mean (%) |")
    print("|---|---|---|" + "---|" * (len(tasks) + 1))
    for selection, number in dict.fromkeys((row["selection"], row["visual_tokens"]) for row in done):
        own = {row["task"]: row for row in done if (row["selection"], row["visual_tokens"]) == (selection, number)}
        tokens = [row["visual_tokens_per_image"] for row in own.values() if row["visual_tokens_per_image"] is not None]
        cells, shares = [], []
        for task in tasks:
            score, error = score_of(own[task]) if task in own else (None, None)
            cell = "-"
            if score is not None and base[task]:
                shares.append(100 * score / base[task])
                cell = f"{shares[-1]:.1f}" + ("" if error is None else f" ± {100 * error / base[task]:.1f}")
            cells.append(f"{cell} ({score:.4g})" if selection == UNPRUNED and score is not None else cell)
        mean = f"{sum(shares) / len(shares):.1f}" if len(shares) == len(tasks) else "-"
        per_image = f"{sum(tokens) / len(tokens):.1f}" if tokens else "-"
        title = SELECTIONS.get(selection, selection)
        print(f"| {title} | {number or 'all'} | {per_image} | {' | '.join(cells)} | {mean} |")
    for selection, reason in {
        row["selection"]: row["not_supported"] for row in rows if "not_supported" in row
    }.items():
        print(f"\nNot supported: {SELECTIONS[selection]}. {reason}")


def main(argv: list[str] | None = None) -> list[dict]:
    (args,) = make_parser(EvaluationArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    if args.layer is None:
        args.layer = default_layer(args.model, args.guide)
    rows = list(make_rows(args))
    print_table(rows, args.tasks)
    return rows


if __name__ == "__main__":
    run_script(main)
