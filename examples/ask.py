"""
An answer within a minute: ask a trained model about a picture, see where it looked, and compare it with its unpruned
twin. Needs no network; the model that comes with this project knows the questions of easy-VQA.

    python examples/ask.py                                      # what `make try` runs: a test picture of easy-VQA
    python examples/ask.py --image picture.png --question "what color is the shape?" "is there a circle?"
    python examples/ask.py --model demo/model                   # after `make demo`

Installed without its source, the script is `python -m trips_examples.ask`.
"""

import trips_examples  # noqa: F401  # isort: skip

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
import torch
import transformers
from easy_vqa import get_test_image_paths

from modeling_trips import (
    TripsForQuestionAnswering,
    TripsProcessor,
    TripsVisualQuestionAnsweringPipeline,
    convert_to_rgb,
)
from modeling_trips.inspection import plot_selection
from modeling_trips.inspection.speed import timed
from trips_examples.training.parser import make_parser


CHECKPOINT = Path(__file__).parent / "trips-tiny-easy-vqa"
QUESTIONS = [
    "what shape is in the image?",
    "what color is the shape?",
    "is there a circle?",
    "is there not a red shape?",
]


@dataclass
class AskArguments:
    model: str = field(default=str(CHECKPOINT), metadata={"help": "Folder of a model that answers questions."})
    image: str | None = field(default=None, metadata={"help": "A picture. Default: one of easy-VQA's test split."})
    question: list[str] = field(default_factory=lambda: list(QUESTIONS), metadata={"help": "One or more questions."})
    picture: str = field(default="outputs/kept_patches.png", metadata={"help": "Where to draw what it looked at."})


def read_image(path: str | None) -> PIL.Image.Image:
    path = get_test_image_paths()[0] if path is None else path
    try:
        with PIL.Image.open(path) as image:
            return convert_to_rgb(image)
    except OSError as error:
        raise SystemExit(f"--image {path}: cannot read it as a picture: {error}") from error


def answers_of(
    model: TripsForQuestionAnswering, processor: TripsProcessor, image: PIL.Image.Image, questions: list[str]
) -> list[dict]:
    """For each question the best answer: `answer` and `score`, its probability."""
    answerer = TripsVisualQuestionAnsweringPipeline(model=model, processor=processor)
    return [best for best, *_ in answerer(image, questions, top_k=1)]


def draw_selection(
    model: TripsForQuestionAnswering,
    processor: TripsProcessor,
    image: PIL.Image.Image,
    questions: list[str],
    answers: list[str],
    path: Path,
):
    """Draws which patches of the image each question keeps in each selection layer."""
    inputs = processor(images=image, text=questions, image_index=[0] * len(questions), return_tensors="pt")
    with torch.no_grad():
        selection = model.model(**inputs).selection
    sizes = [(image.height, image.width)] * len(questions)
    boxes_by_layer = [processor.patch_boxes(layer.kept_indices, sizes) for layer in selection]
    path.parent.mkdir(parents=True, exist_ok=True)
    boxes = [list(layers) for layers in zip(*boxes_by_layer)]
    plot_selection(image, questions, answers, boxes, num_patches=selection[0].scores.shape[1], path=path)


def seconds_of(models: list[TripsForQuestionAnswering], inputs: dict, repeats: int = 9) -> list[float]:
    """Of each model's pass over these inputs: medians of alternating passes."""
    rounds = []
    with torch.no_grad():
        for _ in range(2 + repeats):
            rounds.append([timed(lambda: model.model(**inputs), "cpu") for model in models])  # noqa: B023
    return [statistics.median(times) for times in zip(*rounds[2:])]


def main(argv: list[str] | None = None):
    (args,) = make_parser(AskArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    transformers.utils.logging.disable_progress_bar()
    image = read_image(args.image)
    model = TripsForQuestionAnswering.from_pretrained(args.model).eval()
    twin = TripsForQuestionAnswering.from_pretrained(args.model, keep_rate=1.0).eval()
    processor = TripsProcessor.from_pretrained(args.model)

    print(f"Asked about {args.image or 'a test picture of easy-VQA'}:")
    found, found_by_twin = (answers_of(asked, processor, image, args.question) for asked in (model, twin))
    for question, own, other in zip(args.question, found, found_by_twin):
        answer, twins_answer = (f"{best['answer']} ({best['score']:.1%})" for best in (own, other))
        print(f"  {question:<40} {answer:<20} unpruned: {twins_answer}")

    schedule = model.config.vision_config.selection_schedule
    if schedule:
        limit = "up to " if model.config.selection_mode == "mass" else ""
        rates = ", ".join(f"{limit}{rate:.0%} of the tokens after layer {layer}" for layer, rate in schedule.items())
        draw_selection(model, processor, image, args.question, [best["answer"] for best in found], Path(args.picture))
        print(f"It keeps {rates}. Which patches: {args.picture}")

    for num_images in (1, 64):
        inputs = processor(images=[image] * num_images, text=args.question[:1] * num_images, return_tensors="pt")
        seconds, twins = seconds_of([model, twin], inputs)
        print(
            f"{num_images:>2} x a picture and a question: {1000 * seconds:.0f} ms, unpruned {1000 * twins:.0f} ms: "
            f"{twins / seconds:.2f} times as fast"
        )


if __name__ == "__main__":
    main()
