"""
Train TRIPS on questions about composed scenes on 2 CPU cores, evaluate it, answer questions, draw the kept patches,
and measure its speed against the unpruned baseline.

    python examples/demo.py                         # what `make demo` runs
    python examples/demo.py --num_train_epochs 1    # options for the training of run_vqa.py
    python examples/demo.py --publish_to examples/trips-tiny-scenes    # makes the model that `make try` asks
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

from modeling_trips import TripsForQuestionAnswering, TripsProcessor
from modeling_trips.inspection.speed import Setting, measure
from modeling_trips.publishing.model_card import CardArguments, make_model_card
from trips_examples.ask import QUESTIONS, SCENE, answers_of, draw_selection
from trips_examples.data.images import read_image
from trips_examples.data.scenes import scene_records
from trips_examples.run_vqa import train_question_answering
from trips_examples.training.files import write_json, write_whole
from trips_examples.training.options import DataArguments, ModelArguments, TripsTrainingArguments
from trips_examples.training.parser import run_script
from trips_examples.training.runs import parse_arguments


OUTPUT = Path("demo")
MODEL = OUTPUT / "model"
# All questions of an image stand in one batch and share its computation.
RECIPE = (
    "--dataset_name easy_vqa_scenes --train_scenes 8000 --image_size 64 --texts_per_image 8 "
    "--selection_layers 2 --keep_rate 0.25 --attention_loss_weight 2 --max_steps 2500 "
    "--per_device_train_batch_size 96 --learning_rate 7e-4 --logging_steps 100 --save_strategy no"
).split()
WEIGHTS = "model.safetensors"


@dataclass
class DemoArguments:
    publish_to: str | None = field(
        default=None, metadata={"help": "Folder for the trained model in bfloat16, its processor and model card."}
    )


def answer_questions(model: TripsForQuestionAnswering, processor: TripsProcessor):
    """Print the model's answers to questions about the first test scenes, beside the right ones."""
    for image_id, records in groupby(scene_records("vqa", "test", num_scenes=3), itemgetter("image_id")):
        asked = list(records)[:4]
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


def publish(folder: Path, data_args: DataArguments, command: str):
    """Write the trained model with a card that has its command and the accuracy of the rounded weights."""
    model, processor = ship(MODEL, folder)
    evaluated = OUTPUT / "shipped"
    train_question_answering(
        ModelArguments(model_name_or_path=str(folder)),
        data_args,
        TripsTrainingArguments(output_dir=str(evaluated), do_train=False, do_eval=False),
    )
    args = CardArguments(
        license="apache-2.0", language=["en"], datasets=["composed scenes"], eval_split="test", command=command
    )
    results = evaluated / "test_results.json"
    card = make_model_card(model, processor, folder.as_posix(), args, results=results, with_code=False)
    card.save(folder / "README.md")
    print(f"Shipped: {folder}")


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    start = time.perf_counter()
    options = [*RECIPE, *argv, "--output_dir", str(MODEL)]
    demo_args, model_args, data_args, training_args = parse_arguments(
        options, DemoArguments, ModelArguments, DataArguments, TripsTrainingArguments, description=__doc__
    )
    metrics = train_question_answering(model_args, data_args, training_args)
    model = TripsForQuestionAnswering.from_pretrained(MODEL).eval()
    processor = TripsProcessor.from_pretrained(MODEL)
    print("\nAnswers to test questions:")
    answer_questions(model, processor)
    picture = OUTPUT / "kept_patches.png"
    image = PIL.Image.open(SCENE)
    answers = [best["answer"] for best in answers_of(model, processor, image, QUESTIONS)]
    draw_selection(model, processor, image, QUESTIONS, answers, picture)
    print(f"\nAccuracy: {metrics['test_accuracy']:.2%} of {metrics['test_samples']:,} questions about test scenes")
    for layer, selection in model.config.vision_config.schedule.by_layer.items():
        if inside := metrics.get(f"test_layer{layer}_patch_precision"):
            print(
                f"Layer {layer} keeps {selection.keep_rate:.0%} of its tokens; {inside:.0%} of its patches lie in the "
                f"quarter asked about (at random: {metrics['test_patch_precision_at_random']:.0%})"
            )
    for texts_per_image, title in ((1, "one question per image"), (4, "four questions that share their image")):
        speed = measure_speed(model, texts_per_image)
        print(
            f"Speed, {title}: {1 / speed['time_ratio']:.2f} times that of the unpruned baseline (forward pass of "
            f"64 images), MAC ratio {speed['macs_ratio']:.2f}"
        )
    print(f"Kept patches: {picture}   Model: {MODEL}   Total: {(time.perf_counter() - start) / 60:.1f} minutes")
    if demo_args.publish_to is not None:
        publish(Path(demo_args.publish_to), data_args, command=" ".join(["python examples/demo.py", *argv]))


if __name__ == "__main__":
    run_script(main)
