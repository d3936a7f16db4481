r"""
Evaluate patch selection in a vision-language model on your questions, beside the unpruned model and controls.

    python examples/evaluate_vlm.py --model llava-hf/llava-1.5-7b-hf --validation_file val.jsonl --image_root images
    python examples/evaluate_vlm.py --model Qwen/Qwen2.5-VL-3B-Instruct --validation_file val.jsonl \
        --visual_tokens 64 --selections tower_image fewer_pixels --limit 500 --output_json outputs/qwen.json
    python examples/evaluate_vlm.py ... --tasks gqa pope   # of lmms-eval: pip install lmms-eval "filelock<4"

The file is as for run_vqa.py. Answers are scored by VQA accuracy, or by exact match if a question has one. Every
selection keeps about the same number of visual tokens per image: inside the vision tower (`tower_image`,
`tower_text` with a trained --guide, `tower_random`), between the tower and the language model (`exit_prompt`,
`exit_random`), or by a lower resolution (`fewer_pixels`). A tower keeps a share of the patches: the number divided by
the unpruned model's mean on the task. Numbers that are not below this mean are left out.

The table has the measured mean of visual tokens per image, the score of each task in percent of the unpruned model's,
and the mean over the tasks. Each row is written to --output_json as soon as it is there; rows that are there are not
evaluated again. Run one process.
"""

import trips_examples  # noqa: F401  # isort: skip

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from trips_examples.data.source import option
from trips_examples.training.parser import make_parser, run_script


UNPRUNED = "unpruned"
SELECTIONS = ("tower_image", "tower_text", "tower_random", "exit_prompt", "exit_random", "fewer_pixels")


@dataclass
class EvaluationArguments:
    model: str = field(metadata={"help": "A vision-language model: a folder, or on the Hub."})
    validation_file: str | None = option(None, "Your questions, in the formats of run_vqa.py: JSONL, JSON, CSV, ...")
    image_root: str | None = option(None, "Folder that image paths are relative to. Default: the folder of the file.")
    instruction: str = option("Answer the question using a single word or phrase.", "Line after each own question.")
    tasks: list[str] = option([], "Tasks of lmms-eval that generate text.")
    visual_tokens: list[int] = option([576, 192, 128, 64], "Numbers of visual tokens per image.")
    selections: list[str] | None = option(None, f"Of {', '.join(SELECTIONS)}. Default: all, tower_text with --guide.")
    layer: int | None = option(None, "Layer of the tower that selects. Default: the guide's, or a third.")
    guide: str | None = option(None, "A TextGuide of this layer: a folder, or on the Hub.")
    batch_size: int = option(1, "Questions per step.")
    limit: int | None = option(None, "Questions per task. Default: all.")
    device: str | None = option(None, "Device to run on. Default: a GPU if there is one.")
    dtype: str = option("auto", "Of the weights: auto, float32, bfloat16 or float16.")
    seed: int = option(0, "Seed of random selection at the exit and of sampling.")
    include_path: str | None = option(None, "Folder with lmms-eval tasks of your own.")
    output_json: str = option("outputs/vlm.json", "File that the rows are written to.")

    def __post_init__(self):
        if self.selections is None:
            self.selections = [name for name in SELECTIONS if name != "tower_text" or self.guide is not None]
        if wrong := [name for name in self.selections if name not in SELECTIONS]:
            raise ValueError(f"--selections must be of {', '.join(SELECTIONS)}, got {', '.join(wrong)}.")
        if "tower_text" in self.selections and self.guide is None:
            raise ValueError("--selections tower_text needs a trained --guide.")
        if self.validation_file is None and not self.tasks:
            raise ValueError("Give your questions with --validation_file, or --tasks of lmms-eval.")
        numbers = [*self.visual_tokens, self.batch_size, *([] if self.limit is None else [self.limit])]
        if min(numbers) < 1:
            raise ValueError(f"--visual_tokens, --batch_size and --limit must be at least 1, got {min(numbers)}.")

    def check_files(self):
        if self.validation_file is not None and not Path(self.validation_file).is_file():
            raise FileNotFoundError(f"--validation_file {self.validation_file} does not exist.")
        if self.tasks and find_spec("lmms_eval") is None:
            raise ValueError(
                '--tasks needs lmms-eval (pip install lmms-eval "filelock<4"). Own questions: --validation_file.'
            )


OPTIONS = make_parser(EvaluationArguments, description=__doc__)
if __name__ == "__main__":
    OPTIONS.check()  # before the imports that take seconds

import json
import math
import time
from argparse import Namespace
from functools import cache
from importlib.metadata import version
from statistics import mean, stdev

from datasets import Dataset
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm
from transformers import AutoConfig, set_seed

from modeling_trips.hosts import TextGuide
from modeling_trips.inspection.provenance import provenance
from trips_examples.data.images import column_of, read_image
from trips_examples.data.loading import DataSource, load_task_dataset
from trips_examples.lmms.generation import VisionLanguageModel, question_about
from trips_examples.metrics.texts import variety
from trips_examples.metrics.vqa_accuracy import answer_score, most_common_answer, normalize_answer
from trips_examples.training.files import write_json


# Rows of one file agree in these.
SETTINGS = ("model", "dtype", "layer", "guide", "limit", "seed")


def default_layer(name: str, guide: str | None = None) -> int:
    """Return the layer of the guide, or a third of the layers of the vision tower."""
    if guide is not None and (layer := TextGuide.from_pretrained(guide).layer) is not None:
        return layer
    vision = AutoConfig.from_pretrained(name, trust_remote_code=False).vision_config
    return max(1, round((getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", 1)) / 3))


def model_arguments(selection: str, visual_tokens: int | None, keep_rate: float, args: EvaluationArguments) -> dict:
    """Return the arguments of [`VisionLanguageModel`] for a selection."""
    if selection == UNPRUNED:
        return {}
    if selection == "fewer_pixels":
        return {"resolution_tokens": visual_tokens}
    place, scored_by = selection.split("_")
    if place == "exit":
        return {"visual_tokens": visual_tokens, "scorer": scored_by}
    guide = args.guide if scored_by == "text" else None
    return {"schedule": f"{args.layer}:{scored_by}:{keep_rate}", "guide": guide}


def load_questions(args: EvaluationArguments) -> tuple[str, Dataset]:
    """Return the questions of `--validation_file`, at most `--limit`, and their name, which changes with them."""
    source = DataSource(validation_file=args.validation_file, image_root=args.image_root)
    data = load_task_dataset("vqa", source)["validation"]
    data = data if args.limit is None else data.take(min(args.limit, len(data)))
    columns = [column_of(data, name) for name in ("source", "image_id", "question", "answers")]
    return f"{Path(args.validation_file).name} ({Hasher.hash([columns, args.instruction])[:8]})", data


def evaluate_questions(vlm: VisionLanguageModel, questions: Dataset, args: EvaluationArguments) -> dict:
    """Return the score of the model's answers to questions, its standard error, and how the answers vary."""
    set_seed(args.seed)
    answers: list[str] = []
    for start in tqdm(range(0, len(questions), args.batch_size), desc="questions", leave=False):
        batch = [questions[row] for row in range(start, min(start + args.batch_size, len(questions)))]
        asked = [question_about(read_image(row), f"{row['question']}\n{args.instruction}".strip()) for row in batch]
        answers += vlm.answer(asked, {"max_new_tokens": 32})
    references = column_of(questions, "answers")

    def scores(texts: list[str]) -> list[float]:
        return [answer_score(*pair) for pair in zip(texts, references, strict=True)]

    found, count = scores(answers), len(answers)
    truths = [most_common_answer(each) for each in references]
    varied = variety([*map(normalize_answer, answers)], truths, "answer", lambda texts: mean(scores(texts)))
    error = {"score_error": stdev(found) / math.sqrt(count)} if count > 1 else {}
    named = {name.removeprefix("eval_"): value for name, value in varied.items()}
    return {"score": mean(found), **error, "num_samples": count, **named}


@cache
def task_manager(include_path: str | None):
    from lmms_eval.tasks import TaskManager

    return TaskManager("WARNING", include_path=include_path, model_name="trips_vlm")


def evaluate_task(vlm: VisionLanguageModel, task: str, args: EvaluationArguments) -> dict:
    """Return the score of a task of lmms-eval, and its standard error if the task has one."""
    from lmms_eval.evaluator import simple_evaluate

    from trips_examples.lmms.vlm import TripsVlm

    found = simple_evaluate(
        TripsVlm(vlm, batch_size=args.batch_size),
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
    parts = [part for name in found["results"] if (part := score_of(found, name))]
    means = {"score": mean(part["score"] for part in parts)} if parts else {}
    return {
        **(score_of(found, task) or means),  # a group may only have the scores of its tasks
        "num_samples": sum(number["effective"] for number in found["n-samples"].values()),
        "task_versions": found["versions"],
        "lmms_eval_version": version("lmms_eval"),
    }


def score_of(found: dict, task: str) -> dict[str, float]:
    """Return the `score` of a task of lmms-eval, its first metric in which higher is better, and `score_error`."""
    own = {name.partition(",")[0]: value for name, value in found["results"].get(task, {}).items()}
    numbers = {name: value for name, value in own.items() if isinstance(value, (int, float)) and math.isfinite(value)}
    for name, higher in found["higher_is_better"].get(task, {}).items():
        if higher and name in numbers:
            error = numbers.get(f"{name}_stderr")
            return {"score": numbers[name]} | ({} if error is None else {"score_error": error})
    return {}


def evaluate(selection: dict, task: str, questions: Dataset | None, args: EvaluationArguments) -> dict:
    """Return the results of a task or of questions, with the mean of visual tokens per image."""
    start = time.perf_counter()
    try:
        vlm = VisionLanguageModel(args.model, **selection, device=args.device, dtype=args.dtype)
    except (TypeError, ValueError) as error:
        if not selection:
            raise
        return {"not_supported": str(error)}
    found = evaluate_task(vlm, task, args) if questions is None else evaluate_questions(vlm, questions, args)
    return {
        **found,
        "visual_tokens_per_image": vlm.visual_tokens_per_image,
        "model_commit": getattr(vlm.model.config, "_commit_hash", None),  # on the Hub
        "device": str(vlm.model.device),
        "minutes": round((time.perf_counter() - start) / 60, 2),
    }


def make_rows(tasks: dict[str, Dataset | None], args: EvaluationArguments) -> list[dict]:
    """
    Return all rows, those of the unpruned model first. Each new one is written to the output file at once. Rows of
    other settings in this file raise a `ValueError`.
    """
    path, settings = Path(args.output_json), {name: getattr(args, name) for name in SETTINGS}
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for row in stored:
        if other := [f"{name} {row.get(name)}" for name, value in settings.items() if row.get(name) != value]:
            raise ValueError(f"{path} holds rows with another {', '.join(other)}. Choose another --output_json.")
    runs: list[tuple[str, int | None, str]] = [(UNPRUNED, None, task) for task in tasks]
    runs += [(name, number, task) for number in args.visual_tokens for name in args.selections for task in tasks]
    rows: list[dict] = []
    all_tokens: dict[str, float | None] = {}  # of the unpruned model on each task
    for selection, number, task in (bar := tqdm(runs, desc="evaluations")):
        bar.set_postfix_str(f"{task}, {selection}" + ("" if number is None else f", {number} tokens"))
        unpruned = all_tokens.get(task)
        if number is not None and unpruned is not None and number >= unpruned:
            continue
        key = {"selection": selection, "visual_tokens": number, "task": task}
        row = next((row for row in stored if key.items() <= row.items()), None)
        if row is None:
            keep_rate = 1.0 if number is None or unpruned is None else number / unpruned
            arguments = model_arguments(selection, number, keep_rate, args)
            result = evaluate(arguments, task, tasks[task], args)
            origin = provenance(result.get("device", "cpu"), args.seed) | settings | key
            row = {**origin, "model_args": arguments, "batch_size": args.batch_size, **result}
            stored.append(row)
            write_json(args.output_json, stored)
        if selection == UNPRUNED:
            all_tokens[task] = row["visual_tokens_per_image"]
        rows.append(row)
    return rows


def print_table(rows: list[dict], tasks: list[str]):
    """
    Print percent of the unpruned model's score in Markdown, with the standard error of the task's metric, and the mean
    over the tasks. In the row of the unpruned model its scores are in brackets.
    """
    done = [row for row in rows if "not_supported" not in row]
    base = {row["task"]: row.get("score") for row in done if row["selection"] == UNPRUNED}
    print(f"| selection | visual tokens | mean per image | {' | '.join(tasks)} | mean (%) |")
    print("|---|---|---|" + "---|" * (len(tasks) + 1))
    for selection, number in dict.fromkeys((row["selection"], row["visual_tokens"]) for row in done):
        own = {row["task"]: row for row in done if (row["selection"], row["visual_tokens"]) == (selection, number)}
        tokens = [row["visual_tokens_per_image"] for row in own.values() if row["visual_tokens_per_image"] is not None]
        cells, shares = [], []
        for task in tasks:
            score, error = (own.get(task, {}).get(name) for name in ("score", "score_error"))
            cell = "-"
            if score is not None and base[task]:
                shares.append(100 * score / base[task])
                cell = f"{shares[-1]:.1f}" + ("" if error is None else f" ± {100 * error / base[task]:.1f}")
            cells.append(f"{cell} ({score:.4g})" if selection == UNPRUNED and score is not None else cell)
        per_image = f"{mean(tokens):.1f}" if tokens else "-"
        over_tasks = f"{mean(shares):.1f}" if len(shares) == len(tasks) else "-"
        print(f"| {selection} | {number or 'all'} | {per_image} | {' | '.join(cells)} | {over_tasks} |")
    reasons = {row["selection"]: row["not_supported"] for row in rows if "not_supported" in row}
    for selection, reason in reasons.items():
        print(f"\nNot supported: {selection}. {reason}")


def main(argv: list[str] | None = None) -> list[dict]:
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    args.check_files()
    tasks: dict[str, Dataset | None] = dict.fromkeys(args.tasks)
    if args.validation_file is not None:
        name, questions = load_questions(args)
        tasks[name] = questions
    if args.layer is None:
        args.layer = default_layer(args.model, args.guide)
    rows = make_rows(tasks, args)
    print_table(rows, [*tasks])
    return rows


if __name__ == "__main__":
    run_script(main)
