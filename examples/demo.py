r"""
Teach a trained model, from answers alone and without regions, which 3 of 144 patches to keep, on 2 CPU cores.

    python examples/demo.py                                       # what `make demo` runs
    python examples/demo.py --seed 1 --folder demo1 --bf16        # options for the trainings of run_vqa.py
    python examples/demo.py --from_scratch --publish_to examples/trips-tiny-scenes    # makes both models that ship

The unpruned model of `examples/trips-tiny-scenes-unpruned` goes on with a selection layer that keeps 3 of 144 patches
and learns which from the answers to questions about busy scenes (the folder `model`). At the end: accuracy before and
after, answers, a drawing of the kept patches, and the speed.

`--from_scratch` first trains the unpruned model, on questions about scenes of 2 x 2 cells and then of 4 x 4.
"""

import trips_examples  # noqa: F401  # isort: skip

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from modeling_trips import TripsConfig, TripsForQuestionAnswering, TripsProcessor
from modeling_trips.inspection.provenance import provenance
from modeling_trips.inspection.speed import Setting, measure
from modeling_trips.publishing.model_card import CardArguments, make_model_card
from trips_examples.ask import CHECKPOINT, QUESTIONS, SCENE, answers_of, draw_selection
from trips_examples.data.busy_scenes import KINDS, busy_records
from trips_examples.data.images import read_image
from trips_examples.data.vocabulary import BUNDLED_WORDS
from trips_examples.run_vqa import train_question_answering
from trips_examples.training.files import write_json, write_whole
from trips_examples.training.models import train_processor
from trips_examples.training.options import DataArguments, ModelArguments, TripsTrainingArguments
from trips_examples.training.parser import make_parser, run_script
from trips_examples.training.runs import parse_arguments


# With a single fusion layer, attention to the shape that a question names is learnt within minutes.
SHAPE = {"fusion_encoder_config": {"num_hidden_layers": 1, "skip_stride": 1}}
# All questions of an image stand in one batch and share its computation.
COMMON = (
    "--dataset_name busy_scenes --image_size 96 --texts_per_image 8 --selection_loss_weight 0 --do_eval False "
    "--validation_scenes 8 --test_scenes 300 --adam_beta2 0.999 --save_strategy no --logging_steps 100 "
)
UNPRUNED = "--lr_scheduler_type constant_with_warmup --warmup_steps 50 --do_predict False "
PRUNED = "--selection_layers 2 --keep_rate 0.02 "
SMALL = UNPRUNED + (
    "--grid 2 --train_scenes 12000 --max_steps 2000 --per_device_train_batch_size 240 --learning_rate 1e-3"
)
LARGE = UNPRUNED + "--train_scenes 7200 --max_steps 300 --per_device_train_batch_size 192 --learning_rate 7e-4"
GATE = PRUNED + (
    "--selection_gate 0.2 --train_scenes 3200 --max_steps 400 --per_device_train_batch_size 64 --learning_rate 1e-3"
)
STAGES = {  # folder: title and options
    "unpruned": ("all patches", "--do_train False"),
    "pruned": ("pruned, before training", PRUNED + "--do_train False"),
    "model": ("pruned, trained from answers", GATE),
}
START = CHECKPOINT.with_name(f"{CHECKPOINT.name}-unpruned")
WEIGHTS = "model.safetensors"


@dataclass
class DemoArguments:
    folder: str = field(default="demo", metadata={"help": "Folder of the trained models and the drawing."})
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


ARGUMENTS = (DemoArguments, ModelArguments, DataArguments, TripsTrainingArguments)


def sine_cosine_positions(rows: int, columns: int, width: int) -> torch.Tensor:
    """Positions of patches as in MAE, `(rows * columns, width)`, with wavelengths of 6 to 24 patches."""
    frequencies = 2 * torch.pi / (6 * 4 ** torch.linspace(0, 1, width // 4))
    down, right = (torch.arange(length)[:, None] * frequencies for length in (rows, columns))
    down, right = (torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (down, right))
    return torch.cat([down.repeat_interleave(columns, dim=0), right.repeat(rows, 1)], dim=1)


def make_untrained(folder: Path, seed: int, image_size: int):
    """Write an untrained model for images of `image_size` pixels, with patches of 8 x 8, and its processor."""
    torch.manual_seed(seed)
    config = TripsConfig.from_preset("tiny", image_size=image_size, keep_rate=1.0, **SHAPE)
    processor = train_processor(config, BUNDLED_WORDS)
    model = TripsForQuestionAnswering(config)
    with torch.no_grad():
        model.model.vision_model.embeddings.position_embeddings[0, 1:] = sine_cosine_positions(
            *config.vision_config.grid_size, config.vision_config.hidden_size
        )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def answer_questions(model: TripsForQuestionAnswering, processor: TripsProcessor):
    """Print the model's answers to questions about the first test scenes, beside the right ones."""
    for image_id, records in groupby(busy_records("vqa", "test", num_scenes=3), itemgetter("image_id")):
        asked = list(records)[::2]  # one of each kind
        found = answers_of(model, processor, read_image(asked[0]), [row["question"] for row in asked])
        for row, answer in zip(asked, (best["answer"] for best in found)):
            verdict = "right" if answer == row["answer"] else row["answer"]
            print(f"  {image_id}: {row['question']:<35} {answer:<10} ({verdict})")


def measure_speed(model: TripsForQuestionAnswering, texts_per_image: int) -> dict:
    """Measure text encoder, vision tower and fusion encoder against the unpruned baseline."""
    vision: Any = model.config.vision_config  # a preset's sizes and rates are single numbers
    setting = Setting(
        preset="tiny",
        image_size=vision.image_size,
        batch_size=64,
        texts_per_image=texts_per_image,
        text_length=10,
        selection_layers=vision.selection_layers,
        keep_rate=vision.keep_rate,
        selection_guidance=vision.selection_guidance,
        config_fields=SHAPE,
    )
    return measure(setting, warmup=2, repeats=10)


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


def publish(source: Path, folder: Path, data_args: DataArguments, command: str):
    """Write the trained model with a card that has its command and the accuracy of the rounded weights."""
    model, processor = ship(source, folder)
    evaluated = source.parent / "shipped"
    train_question_answering(
        ModelArguments(model_name_or_path=str(folder)),
        data_args,
        TripsTrainingArguments(output_dir=str(evaluated), do_train=False, do_eval=False),
    )
    args = CardArguments(
        license="apache-2.0", language=["en"], datasets=["busy scenes"], eval_split="test", command=command
    )
    results = evaluated / "test_results.json"
    card = make_model_card(model, processor, folder.as_posix(), args, results=results, with_code=False)
    card.save(folder / "README.md")
    print(f"Shipped: {folder}")


def run_stage(folder: Path, start: Path, own: str, options: list[str]) -> dict[str, float]:
    """Train or evaluate from the model in `start`, and return the metrics."""
    words = [*COMMON.split(), *own.split(), *options, "--output_dir", str(folder)]
    words += ["--model_name_or_path", str(start)]
    _, *args = parse_arguments(words, *ARGUMENTS, description=__doc__)
    print(f"\n{folder.name}: {folder}")
    return train_question_answering(*args)


def print_what_was_learnt(metrics: dict[str, dict[str, float]]):
    """Print accuracies by kind of question, and how many of the kept patches lie in the region of their question."""
    print(f"\n{'Questions about test scenes:':<40}" + "".join(f"{kind:>10}" for kind in KINDS))
    for stage, (title, _) in STAGES.items():
        print(f"  {title:<38}" + "".join(f"{metrics[stage][f'test_accuracy_{kind}']:>10.1%}" for kind in KINDS))
    (name,) = (name for name in metrics["model"] if name.endswith("_patch_precision"))
    before, after = metrics["pruned"][name], metrics["model"][name]
    chance = metrics["model"]["test_patch_precision_at_random"]
    title = "Kept patches that lie in the region of their question"
    print(f"{title}: {before:.0%} before training, {after:.0%} after it, {chance:.0%} at random")


def main(argv: list[str] | None = None):
    began = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(*ARGUMENTS, description=__doc__)
    demo_args, model_args, data_args, training_args = parser.parse_args_into_dataclasses([*COMMON.split(), *argv])
    folder, start = Path(demo_args.folder), START
    if demo_args.from_scratch:
        make_untrained(folder / "untrained", training_args.seed, model_args.image_size)
        half = ["--image_size", str(model_args.image_size // 2)]  # 2 x 2 cells of the same size
        run_stage(folder / "small", folder / "untrained", SMALL, [*argv, *half])
        start = folder / "start"
        run_stage(start, folder / "small", LARGE, argv)
    metrics = {stage: run_stage(folder / stage, start, own, argv) for stage, (_, own) in STAGES.items()}
    model = TripsForQuestionAnswering.from_pretrained(folder / "model").eval()
    processor = TripsProcessor.from_pretrained(folder / "model")
    print("\nAnswers to test questions:")
    answer_questions(model, processor)
    picture = folder / "kept_patches.png"
    image = PIL.Image.open(SCENE)
    answers = [best["answer"] for best in answers_of(model, processor, image, QUESTIONS)]
    draw_selection(model, processor, image, QUESTIONS, answers, picture)
    print_what_was_learnt(metrics)
    for texts_per_image, title in ((1, "one question per image"), (4, "four questions that share their image")):
        speed = measure_speed(model, texts_per_image)
        print(
            f"Speed, {title}: {1 / speed['time_ratio']:.2f} times that of the unpruned baseline (forward pass of "
            f"64 images), MAC ratio {speed['macs_ratio']:.2f}"
        )
    minutes = (time.perf_counter() - began) / 60
    accuracies = {f"{stage}_{kind}": metrics[stage][f"test_accuracy_{kind}"] for stage in STAGES for kind in KINDS}
    own = {"from_scratch": demo_args.from_scratch, "bf16": training_args.bf16, "minutes": round(minutes, 1)}
    write_json(folder / "results.json", {**provenance(seed=training_args.seed), **own, **accuracies})
    print(f"Kept patches: {picture}   Model: {folder / 'model'}   Total: {minutes:.1f} minutes")
    if demo_args.publish_to is not None:
        command = " ".join(["python examples/demo.py", *argv])
        publish(folder / "model", Path(demo_args.publish_to), data_args, command)
        if demo_args.from_scratch:
            publish(start, Path(f"{demo_args.publish_to}-unpruned"), data_args, command)


if __name__ == "__main__":
    run_script(main)
