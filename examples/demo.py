r"""
Teach a trained model, from answers alone and without regions, which one of 144 patches to keep, on 2 CPU cores.

    python examples/demo.py                                       # what `make demo` runs
    python examples/demo.py --seed 1 --folder demo1 --bf16
    python examples/demo.py --from_scratch --publish_to outputs/tiny    # writes such a pair, from nothing

The unpruned model of `examples/trips-tiny-scenes-unpruned` goes on with a selection layer that keeps one of 144
patches and learns which from the answers to questions about busy scenes (the folder `model`). At the end: accuracy
before and after, answers, and a drawing of the kept patches.

`--from_scratch` first trains the unpruned model: on questions about one shape, about up to four and about up to eight.
"""

import trips_examples  # noqa: F401  # isort: skip

from dataclasses import dataclass, field

from trips_examples.training.options import make_parser, run_script


@dataclass
class DemoArguments:
    folder: str = field(default="demo", metadata={"help": "Folder of the trained models and the drawing."})
    seed: int = field(default=42, metadata={"help": "Seed of the trainings."})
    bf16: bool = field(default=False, metadata={"help": "Train in bf16 mixed precision. Default: float32."})
    max_steps: int | None = field(default=None, metadata={"help": "Steps of each training. Default: those that ship."})
    train_scenes: int | None = field(default=None, metadata={"help": "Training scenes, also by default."})
    test_scenes: int = field(default=300, metadata={"help": "Test scenes."})
    from_scratch: bool = field(
        default=False, metadata={"help": "Train the unpruned model first, in place of the one that ships."}
    )
    publish_to: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the trained model in bfloat16, its processor and model card. With --from_scratch, "
            "FOLDER-unpruned gets the unpruned model."
        },
    )


OPTIONS = make_parser(DemoArguments, description=__doc__)
if __name__ == "__main__":
    OPTIONS.check()  # before the imports that take seconds

import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from modeling_trips import TripsConfig, TripsForQuestionAnswering, TripsProcessor
from modeling_trips.inspection.provenance import provenance
from modeling_trips.publishing import make_model_card
from trips_examples import ask
from trips_examples.data.busy_scenes import KINDS
from trips_examples.data.vocabulary import BUNDLED_WORDS
from trips_examples.run_vqa import train_question_answering
from trips_examples.training.files import write_json, write_whole
from trips_examples.training.models import train_processor
from trips_examples.training.options import DataArguments, ModelArguments
from trips_examples.training.runs import TripsTrainingArguments


# With a single fusion layer, attention to the shape that a question names is learnt within minutes.
SHAPE = {"fusion_encoder_config": {"num_hidden_layers": 1, "skip_stride": 1}}
START = ask.CHECKPOINT.with_name(f"{ask.CHECKPOINT.name}-unpruned")
WEIGHTS = "model.safetensors"
PRUNED = {"selection_layers": [2], "keep_rate": [0.005]}
CONSTANT = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 50, "do_predict": False}
STAGES: dict[str, tuple[dict, dict, dict]] = {  # folder: options of the model, of the data and of the training
    "one": (
        {},
        {"grid": 1, "train_scenes": 12000},
        {"max_steps": 600, "per_device_train_batch_size": 240, "learning_rate": 1e-3, **CONSTANT},
    ),
    "few": (
        {},
        {"grid": 2, "train_scenes": 12000},
        {"max_steps": 2000, "per_device_train_batch_size": 240, "learning_rate": 1e-3, **CONSTANT},
    ),
    "start": (
        {},
        {"train_scenes": 8000},
        {"max_steps": 1000, "per_device_train_batch_size": 128, "learning_rate": 1e-3, "do_predict": False},
    ),
    "unpruned": ({}, {}, {"do_train": False}),
    "pruned": (PRUNED, {}, {"do_train": False}),
    "model": (
        {**PRUNED, "selection_gate": 0.2},
        {"train_scenes": 3200},
        {"max_steps": 800, "per_device_train_batch_size": 64, "learning_rate": 1e-3},
    ),
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
    config = TripsConfig.from_preset("tiny", image_size=96, keep_rate=1.0, **SHAPE)
    processor = train_processor(config, BUNDLED_WORDS)
    model = TripsForQuestionAnswering(config)
    with torch.no_grad():
        model.model.vision_model.embeddings.position_embeddings[0, 1:] = sine_cosine_positions(
            *config.vision_config.grid_size, config.vision_config.hidden_size
        )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def without_code(fields: dict) -> dict:
    """Return the fields of a JSON file that name no code, as the folder has none."""
    return {name: value for name, value in fields.items() if name not in ("auto_map", "custom_pipelines")}


def ship(source: Path, target: Path) -> tuple[TripsForQuestionAnswering, TripsProcessor]:
    """
    Write the model and the processor of `source` into `target`, without code. The weights are stored as bfloat16 and
    load as float32, which is faster on CPUs.

    Returns:
        The model, in bfloat16, and the processor, for a card.
    """
    model = TripsForQuestionAnswering.from_pretrained(source, dtype=torch.bfloat16)
    processor = TripsProcessor.from_pretrained(source)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for path in Path(folder).glob("*.json"):
            fields = json.loads(path.read_text(encoding="utf-8"), object_hook=without_code)
            if path.name == "config.json":
                fields["dtype"] = "float32"
            write_json(target / path.name, fields)
        write_whole(target / WEIGHTS, (Path(folder) / WEIGHTS).read_bytes())
    return model, processor


def publish(source: Path, folder: Path, args: DemoArguments, command: str):
    """Write the trained model with a card that has its command and the accuracy of the rounded weights."""
    model, processor = ship(source, folder)
    evaluated = source.parent / "shipped"
    train_question_answering(
        ModelArguments(str(folder)),
        DataArguments("busy_scenes", validation_scenes=8, test_scenes=args.test_scenes),
        TripsTrainingArguments(output_dir=str(evaluated), do_train=False, do_eval=False),
    )
    card = make_model_card(
        model,
        processor,
        folder.as_posix(),
        results=evaluated / "test_results.json",
        with_code=False,
        datasets=["busy scenes"],
        eval_dataset="busy scenes",
        command=command,
        license="apache-2.0",
        language=["en"],
    )
    card.save(folder / "README.md")
    print(f"Shipped: {folder}")


def run_stage(name: str, start: Path, args: DemoArguments) -> dict[str, float]:
    """Train or evaluate a stage from the model in `start`, and return the metrics."""
    model, data, training = STAGES[name]
    if training.get("do_train", True):
        training = {**training, "max_steps": args.max_steps or training["max_steps"]}
        data = {**data, "train_scenes": args.train_scenes or data["train_scenes"]}
    transformers.set_seed(args.seed)
    folder = Path(args.folder) / name
    print(f"\n{name}: {folder}")
    return train_question_answering(
        # All questions of an image stand in one batch and share its computation.
        ModelArguments(str(start), image_size=24 * data.get("grid", 4), selection_loss_weight=0.0, **model),
        DataArguments("busy_scenes", validation_scenes=8, test_scenes=args.test_scenes, **data),
        TripsTrainingArguments(
            output_dir=str(folder),
            seed=args.seed,
            bf16=args.bf16,
            texts_per_image=8,
            adam_beta2=0.999,
            do_eval=False,
            save_strategy="no",
            logging_steps=100,
            **training,
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
    before, after = metrics["pruned"][name], metrics["model"][name]
    chance = metrics["model"]["test_patch_precision_at_random"]
    title = "Kept patches that lie in the region of their question"
    print(f"{title}: {before:.0%} before training, {after:.0%} after it, {chance:.0%} at random")


def main(argv: list[str] | None = None):
    began = time.perf_counter()
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    folder, start = Path(args.folder), START
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    if args.from_scratch:
        make_untrained(folder / "untrained", args.seed)
        start = folder / "untrained"
        for stage in (stage for stage in STAGES if stage not in TITLES):
            run_stage(stage, start, args)
            start = folder / stage
    metrics = {stage: run_stage(stage, start, args) for stage in TITLES}
    print()
    ask.main(["--model", str(folder / "model"), "--picture", str(folder / "kept_patches.png")])
    print_what_was_learnt(metrics)
    minutes = (time.perf_counter() - began) / 60
    accuracies = {f"{stage}_{kind}": metrics[stage][f"test_accuracy_{kind}"] for stage in TITLES for kind in KINDS}
    precision = "bfloat16 mixed" if args.bf16 else "float32"
    own = {"from_scratch": args.from_scratch, "precision": precision, "minutes": round(minutes, 1)}
    write_json(folder / "results.json", {**provenance(seed=args.seed), **own, **accuracies})
    print(f"Model: {folder / 'model'}   Total: {minutes:.1f} minutes")
    if args.publish_to is not None:
        command = " ".join(["python examples/demo.py", *(sys.argv[1:] if argv is None else argv)])
        publish(folder / "model", Path(args.publish_to), args, command)
        if args.from_scratch:
            publish(start, Path(f"{args.publish_to}-unpruned"), args, command)


if __name__ == "__main__":
    run_script(main)
