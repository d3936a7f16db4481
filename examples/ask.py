"""
Ask a trained model about an image, draw the patches that it keeps, and compare it with the same weights at keep rate
1.0. Takes less than a minute and needs no network: the model that comes with this project knows busy scenes.

    python examples/ask.py                                      # what `make try` runs: a test scene
    python examples/ask.py --image picture.png --question "what color is the circle?" "is there a red circle?"
    python examples/ask.py --model demo/model                   # after `make demo`
"""

from dataclasses import dataclass
from pathlib import Path

from trips_examples.data.source import check_is_file, option
from trips_examples.training.options import make_parser, run_script


CHECKPOINT = Path(__file__).parent / "trips-tiny-scenes"
SCENE = Path(__file__).parent / "scene.png"  # test scene 54 of seed 0
QUESTIONS = [
    "what mark is on the red circle?",
    "what mark is on the red square?",
    "what color is the cross?",
    "is there a pink circle?",
]


@dataclass
class AskArguments:
    model: str = option(str(CHECKPOINT), "Checkpoint that answers questions: a folder, or a name on the Hub.")
    image: str = option(str(SCENE), "An image: a path or URL. Default: a busy scene of the test split.")
    question: list[str] = option(QUESTIONS, "One or more questions.")
    picture: str = option("outputs/kept_patches.png", "Drawing of the kept patches.")
    keep_rate: float | None = option(None, "Share of the patches to keep, in place of the model's.")

    def check_files(self):
        """Raise an `OSError` for an image that is not there."""
        if "://" not in self.image:
            check_is_file("image", self.image)


OPTIONS = make_parser(AskArguments, description=__doc__, script=__name__)

import statistics

import PIL.Image
import torch
import transformers
from matplotlib.figure import Figure

from modeling_trips import (
    UNPRUNED,
    SelectionSchedule,
    TripsForQuestionAnswering,
    TripsProcessor,
    TripsVisualQuestionAnsweringPipeline,
)
from modeling_trips.inspection import plot_selection
from modeling_trips.inspection.checkpoints import load_checkpoint, load_processor
from modeling_trips.inspection.speed import seconds_in_turns
from modeling_trips.processing_trips import read_image


SAME_WEIGHTS = "same weights, keep rate 1.0"
SAME_WEIGHTS_NOTE = (
    f'"{SAME_WEIGHTS[0].upper()}{SAME_WEIGHTS[1:]}" prunes nothing, but the weights were not trained that way. '
    "An unpruned baseline needs its own training."
)


def answers_of(
    model: TripsForQuestionAnswering,
    processor: TripsProcessor,
    image: PIL.Image.Image,
    questions: list[str],
    schedule: SelectionSchedule,
    threshold: float = 0.0,
) -> list[dict]:
    """Return the best answer to each question, "unsure" if its `score` is below the threshold."""
    answerer = TripsVisualQuestionAnsweringPipeline(model=model, processor=processor)
    inputs = processor(images=image, text=questions, image_index=[0] * len(questions), return_tensors="pt")
    outputs = answerer.forward({"inputs": {**inputs, "schedule": schedule}}, top_k=1)
    return [answerer.postprocess(answers, threshold)[0] for answers in outputs["outputs"]]


def shown(best: dict) -> str:
    """Return an answer with its probability and the words of its question that the model has not learnt."""
    unknown = best.get("unknown_words")
    note = f"; unknown: {', '.join(unknown)}" if unknown else ""
    return f"{best['answer']} ({best['score']:.1%}{note})"


@torch.no_grad()
def draw_selection(
    model: TripsForQuestionAnswering,
    processor: TripsProcessor,
    image: PIL.Image.Image,
    questions: list[str],
    answers: list[str],
    schedule: SelectionSchedule,
    path: str | Path | None = None,
) -> Figure:
    """Draw the patches of the image that each question keeps in each selection layer."""
    inputs = processor(images=image, text=questions, image_index=[0] * len(questions), return_tensors="pt")
    kept = model.model(**inputs, schedule=schedule).selection
    sizes = [(image.height, image.width)] * len(questions)
    boxes_of_layers = [processor.patch_boxes(layer.kept_indices, sizes) for layer in kept]
    return plot_selection(
        image,
        questions=questions,
        answers=answers,
        boxes_per_question=[list(boxes) for boxes in zip(*boxes_of_layers)],  # for each question, of each layer
        num_patches=kept[0].scores.shape[1],
        path=path,
    )


@torch.no_grad()
def print_times(model: TripsForQuestionAnswering, schedule: SelectionSchedule, inputs: dict):
    """Print the median time of a forward pass of 1 and 64 images and, of a pruned model, at keep rate 1.0."""
    for num_images in (1, 64):
        batch = {name: tensor.repeat_interleave(num_images, dim=0) for name, tensor in inputs.items()}
        steps = {"own": lambda batch=batch: model.model(**batch, schedule=schedule)}
        if schedule.layers:
            steps["unpruned"] = lambda batch=batch: model.model(**batch, schedule=UNPRUNED)
        times = seconds_in_turns(steps, warmup=2, repeats=9)
        seconds, *others = (statistics.median(all_times) for all_times in times.values())
        line = f"{num_images:>2} x an image and a question: {1000 * seconds:.0f} ms"
        for other in others:
            line += f", at keep rate 1.0 {1000 * other:.0f} ms: {other / seconds:.2f} times as fast"
        print(line)


def main(argv: list[str] | None = None):
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        image = read_image(args.image)
    except (OSError, ValueError) as error:
        raise ValueError(f"--image {args.image}: {error}") from error
    model = load_checkpoint(args.model, [TripsForQuestionAnswering])
    processor = load_processor(args.model, model.config)
    schedule = model.config.vision_config.schedule
    if args.keep_rate is not None:
        schedule = schedule.with_keep_rate(args.keep_rate)

    print(f"Asked about {args.image if args.image != str(SCENE) else 'a scene of eight shapes'}:")
    found = answers_of(model, processor, image, args.question, schedule)
    others = found
    if schedule.layers:
        others = answers_of(model, processor, image, args.question, UNPRUNED)
    for question, own, other in zip(args.question, found, others):
        compared = f"{SAME_WEIGHTS}: {shown(other)}" if schedule.layers else ""
        print(f"  {question:<40} {shown(own)}".ljust(64) + compared)
    inputs = processor(images=image, text=args.question[0], return_tensors="pt")
    if schedule.layers:
        print(SAME_WEIGHTS_NOTE)
        with torch.no_grad():
            layers = model.model(**inputs, schedule=schedule).selection
        kept = []
        for number, layer in zip(schedule.layers, layers):
            kept.append(f"{layer.kept_indices.shape[1]} of {layer.scores.shape[1]} patches after layer {number}")
        answers = [best["answer"] for best in found]
        draw_selection(model, processor, image, args.question, answers, schedule, args.picture)
        print(f"It keeps {', '.join(kept)}. Which patches: {args.picture}")
    print_times(model, schedule, inputs)


if __name__ == "__main__":
    run_script(main)
