r"""
Evaluate patch selection in a vision-language model on your questions, beside the unpruned model and controls.

    python examples/evaluate_vlm.py --model llava-hf/llava-1.5-7b-hf --validation_file val.jsonl --image_root images
    python examples/evaluate_vlm.py --model Qwen/Qwen2.5-VL-3B-Instruct --validation_file val.jsonl \
        --visual_tokens 64 --selections tower_image fewer_pixels --limit 500 --output_json outputs/qwen.json

The file is as for run_vqa.py. Answers are scored by VQA accuracy, or by exact match if a question has one. Every
selection keeps about the same number of visual tokens per image: inside the vision tower (`tower_image`,
`tower_text` with a trained --guide, `tower_random`), between the tower and the language model (`exit_prompt`,
`exit_divprune`, `exit_cdpruner`, `exit_random`), or by a lower resolution (`fewer_pixels`). Tower and exit keep a
share of each image: the number divided by the unpruned model's mean. Numbers that are not below it are left out.

The table has the measured mean of visual tokens per image, the score, and its share of the unpruned model's. Each row
is written to --output_json as soon as it is there; rows of these settings are not evaluated again. Run one process.
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from trips_examples.data.source import option
from trips_examples.training.checks import check_device
from trips_examples.training.options import make_parser, run_script


UNPRUNED = "unpruned"
SELECTIONS = (
    "tower_image",
    "tower_text",
    "tower_random",
    "exit_prompt",
    "exit_divprune",
    "exit_cdpruner",
    "exit_random",
    "fewer_pixels",
)


@dataclass
class EvaluationArguments:
    model: str = option(MISSING, "A vision-language model: a folder, or on the Hub.")
    validation_file: str = option(MISSING, "Your questions, in the formats of run_vqa.py: JSONL, CSV, ...")
    image_root: str | None = option(None, "Folder that image paths are relative to. Default: the folder of the file.")
    instruction: str = option("Answer the question using a single word or phrase.", "Line after each question.")
    visual_tokens: list[int] = option([576, 192, 128, 64], "Numbers of visual tokens per image.")
    selections: list[str] | None = option(None, "Default: all, tower_text with --guide.", choices=SELECTIONS)
    layer: int | None = option(None, "Layer of the tower that selects. Default: the guide's, or a third.")
    guide: str | None = option(None, "A TextGuide of this layer: a folder, or on the Hub.")
    batch_size: int = option(1, "Questions per step.")
    limit: int | None = option(None, "Number of questions. Default: all.")
    device: str | None = option(None, "Device to run on. Default: a GPU if there is one.")
    dtype: str = option("auto", "Of the weights: auto, float32, bfloat16 or float16.")
    seed: int = option(0, "Seed of random selection at the exit.")
    output_json: str = option("outputs/vlm.json", "File that the rows are written to.")

    def __post_init__(self):
        if self.selections is None:
            self.selections = [name for name in SELECTIONS if name != "tower_text" or self.guide is not None]
        if "tower_text" in self.selections and self.guide is None:
            raise ValueError("--selections tower_text needs a trained --guide.")
        numbers = [*self.visual_tokens, self.batch_size]
        if self.limit is not None:
            numbers.append(self.limit)
        if min(numbers) < 1:
            raise ValueError(f"--visual_tokens, --batch_size and --limit must be at least 1, got {min(numbers)}.")

    def check_files(self):
        """Raise a `ValueError` for a wrong device."""
        check_device(self.device)


OPTIONS = make_parser(EvaluationArguments, description=__doc__, script=__name__)

import json
import math
import time
from statistics import mean, stdev

from datasets import Dataset
from datasets.fingerprint import Hasher
from huggingface_hub.utils import chunk_iterable
from tqdm.auto import tqdm
from transformers import AutoConfig, set_seed

from modeling_trips.hosts import TextGuide
from modeling_trips.inspection.provenance import provenance
from trips_examples.data.images import column_of, read_image
from trips_examples.data.loading import DataArguments, load_task_dataset
from trips_examples.metrics.diagnostics import variety
from trips_examples.metrics.generation import VisionLanguageModel
from trips_examples.metrics.vqa_accuracy import answer_score, most_common_answer, normalize_answer
from trips_examples.training.files import write_json


SETTINGS = ("model", "dtype", "layer", "guide", "limit", "seed")


def default_layer(name: str, guide: str | None = None) -> int:
    """Return the layer of the guide, or a third of the layers of the vision tower."""
    if guide is not None:
        layer = TextGuide.from_pretrained(guide).layer
        if layer is not None:
            return layer
    vision = AutoConfig.from_pretrained(name, trust_remote_code=False).vision_config
    num_layers = getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", 1)
    return max(1, round(num_layers / 3))


def model_arguments(selection: str, visual_tokens: int | None, keep_rate: float, args: EvaluationArguments) -> dict:
    """Return the arguments of [`VisionLanguageModel`] for a selection."""
    if selection == UNPRUNED:
        return {}
    if selection == "fewer_pixels":
        return {"resolution_tokens": visual_tokens}
    place, scored_by = selection.split("_")
    if place == "exit":
        return {"keep_rate": keep_rate, "scorer": scored_by}
    guide = args.guide if scored_by == "text" else None
    return {"schedule": f"{args.layer}:{scored_by}:{keep_rate}", "guide": guide}


def load_questions(args: EvaluationArguments) -> tuple[str, Dataset]:
    """Return the questions of `--validation_file`, at most `--limit`, and their name, which changes with them."""
    source = DataArguments(validation_file=args.validation_file, image_root=args.image_root)
    questions = load_task_dataset("vqa", source)["validation"]
    if args.limit is not None:
        questions = questions.take(min(args.limit, len(questions)))
    columns = [column_of(questions, name) for name in ("source", "image_id", "question", "answers")]
    version = Hasher.hash([columns, args.instruction])[:8]
    return f"{Path(args.validation_file).name} ({version})", questions


def scores_of(vlm: VisionLanguageModel, questions: Dataset, args: EvaluationArguments) -> dict:
    """Return the score of the model's answers to questions, its standard error, and how the answers vary."""
    set_seed(args.seed)
    answers: list[str] = []
    for rows in map(list, chunk_iterable(tqdm(questions, desc="questions", leave=False), args.batch_size)):
        texts = [f"{row['question']}\n{args.instruction}".strip() for row in rows]
        answers += vlm.answer([read_image(row) for row in rows], texts)
    references = column_of(questions, "answers")

    def scores_of_texts(texts: list[str]) -> list[float]:
        return [answer_score(text, reference) for text, reference in zip(texts, references, strict=True)]

    scores = scores_of_texts(answers)
    results = {"score": mean(scores)}
    if len(scores) > 1:
        results["score_error"] = stdev(scores) / math.sqrt(len(scores))
    results["num_samples"] = len(scores)
    normalized = [normalize_answer(answer) for answer in answers]
    truths = [most_common_answer(reference) for reference in references]
    results |= variety(normalized, truths, "answer", lambda texts: mean(scores_of_texts(texts)))
    return results


def evaluate(selection: dict, questions: Dataset, args: EvaluationArguments) -> dict:
    """Return the results of a selection, with the mean of visual tokens per image."""
    start = time.perf_counter()
    try:
        vlm = VisionLanguageModel(args.model, **selection, device=args.device, dtype=args.dtype)
    except (TypeError, ValueError) as error:
        if not selection:
            raise
        return {"not_supported": str(error)}
    return {
        **scores_of(vlm, questions, args),
        "visual_tokens_per_image": vlm.visual_tokens_per_image,
        "model_commit": getattr(vlm.model.config, "_commit_hash", None),  # on the Hub
        "device": str(vlm.model.device),
        "minutes": round((time.perf_counter() - start) / 60, 2),
    }


def make_rows(name: str, questions: Dataset, args: EvaluationArguments) -> list[dict]:
    """Return all rows, that of the unpruned model first. Each new one is added to the output file at once."""
    path = Path(args.output_json)
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    settings = {setting: getattr(args, setting) for setting in SETTINGS}
    runs: list[tuple[str, int | None]] = [(UNPRUNED, None)]
    for number in args.visual_tokens:
        runs += [(selection, number) for selection in args.selections]
    rows: list[dict] = []
    for selection, visual_tokens in tqdm(runs, desc="selections"):
        keep_rate = 1.0
        if visual_tokens is not None:
            keep_rate = visual_tokens / rows[0]["visual_tokens_per_image"]
            if keep_rate >= 1:
                continue
        key = {"selection": selection, "visual_tokens": visual_tokens, "questions": name, **settings}
        row = next((row for row in stored if key.items() <= row.items()), None)
        if row is None:
            arguments = model_arguments(selection, visual_tokens, keep_rate, args)
            results = evaluate(arguments, questions, args)
            origin = provenance(results.get("device", "cpu"), args.seed)
            row = {**origin, **key, "model_args": arguments, "batch_size": args.batch_size, **results}
            stored.append(row)
            write_json(args.output_json, stored)
        rows.append(row)
    return rows


def print_table(rows: list[dict]):
    """Print scores with their standard errors, and percent of the unpruned model's score, in Markdown."""
    print("| selection | visual tokens | mean per image | score (%) | of the unpruned score (%) |")
    print("|---|---|---|---|---|")
    unpruned_score = rows[0]["score"]
    reasons = {}
    for row in rows:
        if "not_supported" in row:
            reasons[row["selection"]] = row["not_supported"]
            continue
        error = f" ± {100 * row['score_error']:.1f}" if "score_error" in row else ""
        share = f"{100 * row['score'] / unpruned_score:.1f}" if unpruned_score else "-"
        cells = [
            row["selection"],
            str(row["visual_tokens"] or "all"),
            f"{row['visual_tokens_per_image']:.1f}",
            f"{100 * row['score']:.1f}{error}",
            share,
        ]
        print(f"| {' | '.join(cells)} |")
    for selection, reason in reasons.items():
        print(f"\nNot supported: {selection}. {reason}")


def main(argv: list[str] | None = None) -> list[dict]:
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    if args.layer is None:
        args.layer = default_layer(args.model, args.guide)
    name, questions = load_questions(args)
    rows = make_rows(name, questions, args)
    print_table(rows)
    return rows


if __name__ == "__main__":
    run_script(main)
