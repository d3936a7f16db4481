"""
Ask a trained model about an image, draw the patches that it keeps, and compare it with the same weights at keep rate
1.0. Takes less than a minute and needs no network: the model that comes with this project knows composed scenes.

    python examples/ask.py                                      # what `make try` runs: a test scene
    python examples/ask.py --image picture.png --question "what color is the circle?" "is there a red circle?"
    python examples/ask.py --model demo/model                   # after `make demo`; exported folders work, too
"""

import trips_examples  # noqa: F401  # isort: skip

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
import torch
import transformers

from modeling_trips import (
    UNPRUNED,
    TripsForQuestionAnswering,
    TripsProcessor,
    TripsVisualQuestionAnsweringPipeline,
)
from modeling_trips.inspection import plot_selection
from modeling_trips.inspection.checkpoints import is_exported, load_checkpoint
from modeling_trips.inspection.speed import seconds_in_turns
from modeling_trips.processing_trips import read_image
from trips_examples.analysis import SAME_WEIGHTS, SAME_WEIGHTS_NOTE
from trips_examples.training.parser import make_parser, run_script


CHECKPOINT = Path(__file__).parent / "trips-tiny-scenes"
SCENE = Path(__file__).parent / "scene.png"  # test scene 35 of seed 0
QUESTIONS = [
    "what color is the circle?",
    "what shape is the red shape?",
    "is there a blue rectangle?",
    "is there a yellow triangle?",
]


@dataclass
class AskArguments:
    model: str = field(
        default=str(CHECKPOINT), metadata={"help": "Checkpoint or exported model that answers questions."}
    )
    image: str | None = field(
        default=None, metadata={"help": "An image. Default: a composed scene of the test split."}
    )
    question: list[str] = field(default_factory=lambda: list(QUESTIONS), metadata={"help": "One or more questions."})
    picture: str = field(default="outputs/kept_patches.png", metadata={"help": "Drawing of the kept patches."})


def load_image(path: str | None) -> PIL.Image.Image:
    try:
        return read_image(SCENE if path is None else path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--image {path}: {error}") from error


def load_model(checkpoint: str) -> TripsForQuestionAnswering:
    try:
        if is_exported(checkpoint):
            from modeling_trips.export import load_exported  # an extra

            return load_exported(checkpoint, [TripsForQuestionAnswering])
        return load_checkpoint(checkpoint, [TripsForQuestionAnswering])
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model {checkpoint}: {error}") from error


def answers_of(model: TripsForQuestionAnswering, processor: TripsProcessor, inputs: dict) -> list[dict]:
    """Return the best answer to each question: `answer` and `score`, its probability."""
    answerer = TripsVisualQuestionAnsweringPipeline(model=model, processor=processor)
    return [best for best, *_ in answerer.forward({"inputs": inputs}, top_k=1)["outputs"]]


def describe(best: dict) -> str:
    return f"{best['answer']} ({best['score']:.1%})"


def draw_selection(
    model: TripsForQuestionAnswering,
    processor: TripsProcessor,
    image: PIL.Image.Image,
    inputs: dict,
    questions: list[str],
    answers: list[str],
    path: Path,
):
    """Draw the patches of the image that each question keeps in each selection layer."""
    with torch.no_grad():
        selection = model.model(**inputs).selection
    sizes = [(image.height, image.width)] * len(questions)
    boxes_by_layer = [processor.patch_boxes(layer.kept_indices, sizes) for layer in selection]
    path.parent.mkdir(parents=True, exist_ok=True)
    boxes = [list(layers) for layers in zip(*boxes_by_layer)]
    plot_selection(image, questions, answers, boxes, num_patches=selection[0].scores.shape[1], path=path)


@torch.no_grad()
def seconds_of(model: TripsForQuestionAnswering, inputs: dict, is_compared: bool) -> list[float]:
    """Return the median time of a forward pass and, if it is compared, of one at keep rate 1.0."""

    steps = {"own": lambda: model.model(**inputs)}
    if is_compared:
        steps[SAME_WEIGHTS] = lambda: model.model(**inputs, schedule=UNPRUNED)
    return [statistics.median(seconds) for seconds in seconds_in_turns(steps, warmup=2, repeats=9).values()]


def main(argv: list[str] | None = None):
    (args,) = make_parser(AskArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    transformers.utils.logging.disable_progress_bar()
    image = load_image(args.image)
    model = load_model(args.model)
    processor = TripsProcessor.from_pretrained(args.model)
    schedule = model.config.vision_config.schedule.by_layer
    is_compared = bool(schedule) and not is_exported(args.model)

    print(f"Asked about {args.image or 'a scene of four shapes'}:")
    index = [0] * len(args.question)
    inputs = dict(processor(images=image, text=args.question, image_index=index, return_tensors="pt"))
    found = answers_of(model, processor, inputs)
    answers = [found]
    if is_compared:
        answers.append(answers_of(model, processor, {**inputs, "schedule": UNPRUNED}))
    for question, own, *others in zip(args.question, *answers):
        cells = [f"{describe(own):<20}", *(f"{SAME_WEIGHTS}: {describe(other)}" for other in others)]
        print(f"  {question:<40} {' '.join(cells)}".rstrip())
    if is_compared:
        print(SAME_WEIGHTS_NOTE)
    elif schedule:
        print("The schedule of an exported model is fixed: there is no comparison with keep rate 1.0.")

    if schedule:
        rates = ", ".join(
            f"{selection.keep_rate:.0%} of the tokens after layer {layer}" for layer, selection in schedule.items()
        )
        draw_selection(
            model, processor, image, inputs, args.question, [best["answer"] for best in found], Path(args.picture)
        )
        print(f"It keeps {rates}. Which patches: {args.picture}")

    one = processor(images=image, text=args.question[0], return_tensors="pt")
    for num_images in (1, 64):
        inputs = {name: tensor.repeat_interleave(num_images, dim=0) for name, tensor in one.items()}
        seconds, *others = seconds_of(model, inputs, is_compared)
        line = f"{num_images:>2} x an image and a question: {1000 * seconds:.0f} ms"
        for other in others:
            line += f", at keep rate 1.0 {1000 * other:.0f} ms: {other / seconds:.2f} times as fast"
        print(line)


if __name__ == "__main__":
    run_script(main)
