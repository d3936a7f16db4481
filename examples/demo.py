"""
The whole of TRIPS in one run, on 2 CPU cores: train on easy-VQA, evaluate, answer questions, draw what the questions
kept, and time the model against its unpruned twin.

    python examples/demo.py                         # what `make demo` runs
    python examples/demo.py --num_train_epochs 1    # options for the training of run_vqa.py
"""

import sys
import time
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from easy_vqa import get_test_image_paths, get_test_questions

from modeling_trips import TripsForQuestionAnswering, TripsProcessor
from modeling_trips.inspection import plot_selection
from modeling_trips.inspection.speed import Setting, measure
from trips_examples.run_vqa import main as run_vqa


OUTPUT = Path("demo")
MODEL = OUTPUT / "model"
RECIPE = "--logging_steps 50 --save_strategy no".split()


def answer_questions(model: TripsForQuestionAnswering, processor: TripsProcessor, num_images: int = 3):
    """Prints the model's answers to the first questions on the first test images, beside the right ones."""
    paths, rows = get_test_image_paths(), list(zip(*get_test_questions()))
    for image_id in range(num_images):
        asked = [row for row in rows if row[2] == image_id][:4]
        inputs = processor(
            images=PIL.Image.open(paths[image_id]),
            text=[question for question, _, _ in asked],
            image_index=[0] * len(asked),
            return_tensors="pt",
        )
        answers = processor.post_process_answers(model.generate(**inputs))
        for (question, truth, _), answer in zip(asked, answers):
            print(f"  image {image_id}: {question:<45} {answer:<10} ({'right' if answer == truth else truth})")


def draw_selection(model: TripsForQuestionAnswering, processor: TripsProcessor, path: Path, image_id: int = 0):
    """Draws which patches two questions on one image keep."""
    image = PIL.Image.open(get_test_image_paths()[image_id])
    questions = ["what color is the shape?", "is there a circle?"]
    inputs = processor(images=image, text=questions, image_index=[0, 0], return_tensors="pt")
    answers = processor.post_process_answers(model.generate(**inputs))
    with torch.no_grad():
        selection = model.model(**inputs).selection
    sizes = [(image.height, image.width)] * len(questions)
    boxes_by_layer = [processor.patch_boxes(layer.kept_indices, sizes) for layer in selection]
    boxes = [list(layers) for layers in zip(*boxes_by_layer)]
    plot_selection(image, questions, answers, boxes, num_patches=selection[0].scores.shape[1], path=path)


def measure_speed(model: TripsForQuestionAnswering, texts_per_image: int) -> dict:
    """Text encoder, vision tower and fusion encoder of this size and schedule against their unpruned twin."""
    vision: Any = model.config.vision_config  # a preset's sizes and rates are single numbers
    setting = Setting(
        preset="tiny",
        image_size=vision.image_size,
        batch_size=64,
        texts_per_image=texts_per_image,
        text_length=10,
        selection_layers=vision.selection_layers,
        keep_rate=vision.keep_rate,
        mode="forward",
        dtype="float32",
        attn_implementation="sdpa",
        device="cpu",
        num_threads=torch.get_num_threads(),
        compile=False,
    )
    return measure(setting, warmup=3, repeats=20)


def main(argv: list[str]):
    start = time.perf_counter()
    metrics = run_vqa([*RECIPE, *argv, "--output_dir", str(MODEL)])
    model = TripsForQuestionAnswering.from_pretrained(MODEL).eval()
    processor = TripsProcessor.from_pretrained(MODEL)
    print("\nAnswers to test questions:")
    answer_questions(model, processor)
    picture = OUTPUT / "kept_patches.png"
    draw_selection(model, processor, picture)
    print(f"\nAccuracy on easy-VQA's test split: {metrics['eval_accuracy']:.2%} (always answering yes: 37.33%)")
    for texts_per_image, title in ((1, "one question per image"), (4, "four questions that share their image")):
        speed = measure_speed(model, texts_per_image)
        print(
            f"Speed, {title}: {1 / speed['time_ratio']:.2f} times that of the unpruned twin (forward pass of 64 "
            f"images), with {speed['macs_ratio']:.2f} of its multiply-accumulates"
        )
    print(f"Kept patches: {picture}   Model: {MODEL}   Total: {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main(sys.argv[1:])
