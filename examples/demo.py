r"""
Teach a trained model, from answers alone and without regions, which one of 144 patches to keep, on 2 CPU cores.

    python examples/demo.py                                       # what `make demo` runs
    python examples/demo.py --seed 1 --folder demo1 --bf16

The unpruned model of `examples/trips-tiny-scenes-unpruned` goes on with a selection layer that keeps one of 144
patches and learns which from the answers to questions about busy scenes (the folder `model`). At the end: accuracy
before and after, answers, a drawing of the kept patches, and the speed.
"""

import trips_examples  # noqa: F401  # isort: skip

from dataclasses import dataclass

from trips_examples.data.source import option
from trips_examples.training.options import make_parser, run_script


@dataclass
class DemoArguments:
    folder: str = option("demo", "Folder of the trained models and the drawing.")
    seed: int = option(42, "Seed of the trainings.")
    bf16: bool = option(False, "Train in bf16 mixed precision. Default: float32.")
    max_steps: int = option(800, "Steps of the training.")
    train_scenes: int = option(3200, "Training scenes.")
    test_scenes: int = option(300, "Test scenes.")


OPTIONS = make_parser(DemoArguments, description=__doc__, script=__name__)

import logging
import time
from pathlib import Path
from typing import Any

from modeling_trips.inspection.provenance import provenance
from trips_examples import ask
from trips_examples.data.busy_scenes import CELL_SIZE, KINDS
from trips_examples.run_vqa import train_question_answering
from trips_examples.training.files import write_json
from trips_examples.training.options import DataArguments, ModelArguments
from trips_examples.training.recipe import recipe
from trips_examples.training.runs import TripsTrainingArguments


START = ask.CHECKPOINT.with_name(f"{ask.CHECKPOINT.name}-unpruned")
PRUNED: dict[str, Any] = {"schedule": "2:text:0.005"}
STAGES = {"unpruned": {}, "pruned": PRUNED, "model": PRUNED}  # options of the models
TITLES = {"unpruned": "all patches", "pruned": "pruned, before training", "model": "pruned, trained from answers"}


def train_stage(
    start: Path,
    folder: Path,
    args: Any,
    max_steps: int,
    batch_size: int = 64,
    grid: int = 4,
    do_train: bool = True,
    **options,
) -> dict[str, float]:
    """
    Train a model on questions about busy scenes of `grid` x `grid` cells, or only evaluate it, and return the metrics.

    Args:
        args: With the fields `seed`, `bf16`, `train_scenes` and `test_scenes` of [`DemoArguments`].
        options: Of the model, as in `ModelArguments`.
    """
    print(f"\n{folder}, from {start}")
    return train_question_answering(
        ModelArguments(str(start), image_size=grid * CELL_SIZE, selection_loss_weight=0.0, **options),
        DataArguments(
            "busy_scenes",
            grid=grid,
            train_scenes=args.train_scenes,
            validation_scenes=8,
            test_scenes=args.test_scenes,
        ),
        TripsTrainingArguments(
            output_dir=str(folder),
            seed=args.seed,
            bf16=args.bf16,
            do_train=do_train,
            do_eval=False,
            max_steps=max_steps,
            per_device_train_batch_size=batch_size,
            texts_per_image=8,  # all questions of an image stand in one batch and share its computation
            learning_rate=1e-3,
            adam_beta2=0.999,
            save_strategy="no",
            logging_steps=100,
            **recipe("vqa", {"model": start, **options}),
        ),
    )


def print_what_was_learnt(metrics: dict[str, dict[str, float]]):
    """Print accuracies by kind of question, and how many of the kept patches lie in the region of their question."""
    groups = (*KINDS, "new_wording")
    print(f"\n{'Questions about test scenes:':<40}" + "".join(f"{group.replace('_', ' '):>13}" for group in groups))
    for stage, title in TITLES.items():
        rates = (metrics[stage][f"test_accuracy_{group}"] for group in groups)
        print(f"  {title:<38}" + "".join(f"{rate:>13.1%}" for rate in rates))
    (name,) = (name for name in metrics["model"] if name.endswith("_patch_precision"))
    before = metrics["pruned"][name]
    after = metrics["model"][name]
    chance = metrics["model"]["test_patch_precision_at_random"]
    title = "Kept patches that lie in the region of their question"
    print(f"{title}: {before:.0%} before training, {after:.0%} after it, {chance:.0%} at random")


def main(argv: list[str] | None = None):
    began = time.perf_counter()
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    folder = Path(args.folder)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    metrics = {}
    for stage, options in STAGES.items():
        is_last = stage == "model"
        metrics[stage] = train_stage(START, folder / stage, args, args.max_steps, do_train=is_last, **options)
    print()
    ask.main(["--model", str(folder / "model"), "--picture", str(folder / "kept_patches.png")])
    print_what_was_learnt(metrics)
    minutes = (time.perf_counter() - began) / 60
    results: dict[str, Any] = provenance(seed=args.seed)
    results["precision"] = "bfloat16 mixed" if args.bf16 else "float32"
    results["minutes"] = round(minutes, 1)
    for stage in STAGES:
        for kind in KINDS:
            results[f"{stage}_{kind}"] = metrics[stage][f"test_accuracy_{kind}"]
    write_json(folder / "results.json", results)
    print(f"Model: {folder / 'model'}   Total: {minutes:.1f} minutes")


if __name__ == "__main__":
    run_script(main)
