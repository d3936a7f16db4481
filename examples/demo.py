r"""
Teach a trained model, from answers alone and without regions, which one of 144 patches to keep, on 2 CPU cores.

    python examples/demo.py                                       # what `make demo` runs
    python examples/demo.py --seed 1 --folder demo1 --bf16
    python examples/demo.py --from_scratch --bf16                 # trains the unpruned model, too: about 15 minutes

The unpruned model of `examples/trips-tiny-scenes-unpruned` goes on with a selection layer that keeps one of 144
patches and learns which from the answers to questions about busy scenes (the folder `model`). At the end: accuracy
before and after, answers, a drawing of the kept patches, and the speed.

`--from_scratch` first trains an unpruned model, on scenes of one shape, of up to four and of up to eight.
"""

import trips_examples  # noqa: F401  # isort: skip

from dataclasses import dataclass, field

from trips_examples.training.options import make_parser, run_script


@dataclass
class DemoArguments:
    folder: str = field(default="demo", metadata={"help": "Folder of the trained models and the drawing."})
    seed: int = field(default=42, metadata={"help": "Seed of the trainings."})
    bf16: bool = field(default=False, metadata={"help": "Train in bf16 mixed precision. Default: float32."})
    max_steps: int | None = field(default=None, metadata={"help": "Steps of a training. Default: those of its row."})
    train_scenes: int | None = field(default=None, metadata={"help": "Training scenes. Default: likewise."})
    test_scenes: int = field(default=300, metadata={"help": "Test scenes."})
    from_scratch: bool = field(default=False, metadata={"help": "Train an unpruned model first, and start from it."})


OPTIONS = make_parser(DemoArguments, description=__doc__)
if __name__ == "__main__":
    OPTIONS.check()  # before the imports that take seconds

import logging
import time
from pathlib import Path
from typing import Any

import torch

from modeling_trips import TripsConfig, TripsForQuestionAnswering
from modeling_trips.inspection.provenance import provenance
from trips_examples import ask
from trips_examples.data.busy_scenes import CELL_SIZE, KINDS
from trips_examples.data.vocabulary import BUNDLED_WORDS
from trips_examples.run_vqa import train_question_answering
from trips_examples.training.files import write_json
from trips_examples.training.models import train_processor
from trips_examples.training.options import DataArguments, ModelArguments
from trips_examples.training.runs import TripsTrainingArguments


START = ask.CHECKPOINT.with_name(f"{ask.CHECKPOINT.name}-unpruned")
PRUNED: dict[str, Any] = {"selection_layers": [2], "keep_rate": [0.005]}
STAGES = {"unpruned": {}, "pruned": PRUNED, "model": {**PRUNED, "selection_gate": 0.2}}  # options of the models
# Trainings by folder, the last one with a selection: cells along each side, kinds of questions, scenes, questions per
# step, steps. A new model learns marks of single shapes, how to find a color or a form, then both together.
TRAININGS = {
    "one": (1, KINDS, 12_000, 320, 600),
    "found": (2, KINDS[:2], 12_000, 240, 1_200),
    "again": (1, KINDS, 12_000, 320, 200),
    "few": (2, KINDS, 12_000, 240, 1_200),
    "start": (4, KINDS, 8_000, 128, 1_200),
    "model": (4, KINDS, 3_200, 64, 800),
}
TITLES = {"unpruned": "all patches", "pruned": "pruned, before training", "model": "pruned, trained from answers"}


def sine_cosine_positions(rows: int, columns: int, width: int) -> torch.Tensor:
    """Positions of patches as in MAE, `(rows * columns, width)`, with wavelengths of 6 to 24 patches."""
    frequencies = 2 * torch.pi / (6 * 4 ** torch.linspace(0, 1, width // 4))
    down, right = (torch.arange(length)[:, None] * frequencies for length in (rows, columns))
    down, right = (torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (down, right))
    return torch.cat([down.repeat_interleave(columns, dim=0), right.repeat(rows, 1)], dim=1)


def make_untrained(folder: Path, seed: int):
    """Write an untrained model for images of 96 x 96 pixels, with patches of 8 x 8, and its processor."""
    torch.manual_seed(seed)
    # With a single fusion layer, attention to the shape that a question names is learnt within minutes.
    one_layer = {"num_hidden_layers": 1, "skip_stride": 1}
    config = TripsConfig.from_preset("tiny", image_size=96, keep_rate=1.0, fusion_encoder_config=one_layer)
    processor = train_processor(config, BUNDLED_WORDS)
    model, vision = TripsForQuestionAnswering(config), config.vision_config
    with torch.no_grad():
        positions = sine_cosine_positions(*vision.grid_size, vision.hidden_size)
        model.model.vision_model.embeddings.position_embeddings[0, 1:] = positions
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def run_stage(name: str, start: Path, args: DemoArguments, **options) -> dict[str, float]:
    """Train a model if its folder `name` is one of `TRAININGS`, evaluate it, and return the metrics."""
    folder = Path(args.folder) / name
    print(f"\n{name}: {folder}")
    grid, kinds, scenes, batch_size, steps = TRAININGS.get(name, TRAININGS["model"])
    return train_question_answering(
        ModelArguments(str(start), image_size=grid * CELL_SIZE, selection_loss_weight=0.0, **STAGES.get(name, {})),
        DataArguments(
            grid=grid,
            kinds=[*kinds],
            train_scenes=args.train_scenes or scenes,
            validation_scenes=8,
            test_scenes=args.test_scenes,
        ),
        TripsTrainingArguments(
            output_dir=str(folder),
            seed=args.seed,
            bf16=args.bf16,
            do_train=name in TRAININGS,
            do_eval=False,
            max_steps=args.max_steps or steps,
            per_device_train_batch_size=batch_size,
            texts_per_image=8,  # all of an image stand in one batch and share its computation
            learning_rate=1e-3,
            adam_beta2=0.999,
            save_strategy="no",
            logging_steps=100,
            **options,
        ),
    )


def train_from_scratch(args: DemoArguments) -> Path:
    """Train an unpruned model on scenes that grow, and return its folder."""
    start = Path(args.folder) / "untrained"
    make_untrained(start, args.seed)
    constant = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 30}
    for name in [*TRAININGS][:-1]:
        run_stage(name, start, args, do_predict=False, **({} if name == "start" else constant))
        start = Path(args.folder) / name
    return start


def print_what_was_learnt(metrics: dict[str, dict[str, float]]):
    """Print accuracies by kind of question, and how many of the kept patches lie in the region of their question."""
    groups = (*KINDS, "new_wording")
    print(f"\n{'Questions about test scenes:':<40}" + "".join(f"{group.replace('_', ' '):>13}" for group in groups))
    for stage, title in TITLES.items():
        rates = (metrics[stage][f"test_accuracy_{group}"] for group in groups)
        print(f"  {title:<38}" + "".join(f"{rate:>13.1%}" for rate in rates))
    (name,) = (name for name in metrics["model"] if name.endswith("_patch_precision"))
    before, after = metrics["pruned"][name], metrics["model"][name]
    chance = metrics["model"]["test_patch_precision_at_random"]
    title = "Kept patches that lie in the region of their question"
    print(f"{title}: {before:.0%} before training, {after:.0%} after it, {chance:.0%} at random")


def main(argv: list[str] | None = None):
    began = time.perf_counter()
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    folder = Path(args.folder)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    start = train_from_scratch(args) if args.from_scratch else START
    metrics = {stage: run_stage(stage, start, args) for stage in STAGES}
    print()
    ask.main(["--model", str(folder / "model"), "--picture", str(folder / "kept_patches.png")])
    print_what_was_learnt(metrics)
    minutes = (time.perf_counter() - began) / 60
    accuracies = {f"{stage}_{kind}": metrics[stage][f"test_accuracy_{kind}"] for stage in STAGES for kind in KINDS}
    own = {"precision": "bfloat16 mixed" if args.bf16 else "float32", "minutes": round(minutes, 1)}
    write_json(folder / "results.json", {**provenance(seed=args.seed), **own, **accuracies})
    print(f"Model: {folder / 'model'}   Total: {minutes:.1f} minutes")


if __name__ == "__main__":
    run_script(main)
