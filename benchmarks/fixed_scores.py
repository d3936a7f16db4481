"""
Answer questions about busy scenes with patches that are chosen without learning: those with most of the named color,
of the region that a question is about, at random, or by the scores of the model's own text.

    python benchmarks/fixed_scores.py --model examples/trips-tiny-scenes-unpruned --output_json fixed_scores.json
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import PIL.Image
import torch
from measuring import OutputArguments, run_benchmark
from torch import nn
from tqdm.auto import tqdm

from modeling_trips import (
    UNPRUNED,
    SelectionSchedule,
    TripsForQuestionAnswering,
    TripsProcessor,
    modeling_trips_vision,
)
from trips_examples.data.busy_scenes import COLORS, KINDS, draw_scene


NEAR = 60  # largest distance of a pixel from a named color, in RGB


@dataclass(kw_only=True)
class FixedArguments(OutputArguments):
    model: str = field(metadata={"help": "Checkpoint that answers questions, trained unpruned."})
    schedules: list[str] = field(
        default_factory=lambda: ["2:text:0.005", "2:text:0.02"], metadata={"help": "Schedules of one layer each."}
    )
    scenes: int = field(default=150, metadata={"help": "Scenes of the test split."})
    seed: int = field(default=0, metadata={"help": "Seed of the scenes."})


def share_of_patches(pixels: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
    """Return the mean of pixels, `(height, width)`, in each patch, as `(num_patches,)`."""
    return nn.functional.adaptive_avg_pool2d(torch.tensor(pixels, dtype=torch.float32)[None], grid).flatten()


def by_color(image: PIL.Image.Image, question: dict, grid: tuple[int, int]) -> torch.Tensor:
    """Return the share of pixels near the color that a question names. Where it names none, all patches are equal."""
    near = np.zeros(image.size[::-1])
    for color in COLORS.keys() & question["question"].split():  # at most one
        near = np.linalg.norm(np.asarray(image, dtype=float) - COLORS[color], axis=-1) < NEAR
    return share_of_patches(near, grid)


def by_region(image: PIL.Image.Image, question: dict, grid: tuple[int, int]) -> torch.Tensor:
    """Return the share of pixels in the region of a question, more near its center; all are equal if there is none."""
    inside = np.zeros(image.size[::-1])
    if question["region"] is not None:
        x0, y0, x1, y1 = question["region"]
        rows, columns = np.mgrid[y0:y1, x0:x1] + 0.5
        inside[y0:y1, x0:x1] = 1.1 - 0.1 * np.hypot(rows - (y0 + y1) / 2, columns - (x0 + x1) / 2) / (x1 - x0)
    return share_of_patches(inside, grid)


def at_random(image: PIL.Image.Image, question: dict, grid: tuple[int, int]) -> torch.Tensor:
    return torch.rand(grid).flatten()


WAYS: dict[str, Callable | None] = {"own text": None, "color": by_color, "region": by_region, "random": at_random}


def measure(args: FixedArguments) -> Iterator[dict]:
    model = TripsForQuestionAnswering.from_pretrained(args.model).eval()
    processor = TripsProcessor.from_pretrained(args.model)
    grid = model.config.vision_config.grid_size
    scenes = [draw_scene("test", number, args.seed) for number in range(args.scenes)]

    def answer(schedule: SelectionSchedule, scores_of: Callable | None) -> dict:
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        for scene in tqdm(scenes, desc=f"{schedule}"):
            texts = [question["question"] for question in scene.questions]
            inputs = processor(images=scene.image, text=texts, image_index=[0] * len(texts), return_tensors="pt")
            given: AbstractContextManager = nullcontext()
            if scores_of is not None:
                scores = torch.stack([scores_of(scene.image, each, grid) for each in scene.questions])
                scores = scores + 1e-6 * torch.rand_like(scores)  # equal ones in random order
                scores = scores / scores.sum(dim=1, keepdim=True)
                given = patch.object(modeling_trips_vision, "score_tokens", return_value=scores)
            with torch.no_grad(), given:
                answers = processor.post_process_answers(model.generate(**inputs, schedule=schedule))
            for question, text in zip(scene.questions, answers):
                right[question["kind"]].append(text == question["answer"])
        rates = {f"accuracy_{kind}": statistics.mean(values) for kind, values in right.items()}
        return {**rates, "accuracy": statistics.mean(rates.values())}

    yield {"scored_by": "all", "schedule": str(UNPRUNED), **answer(UNPRUNED, None)}
    for schedule in map(SelectionSchedule.parse, args.schedules):
        for way, scores_of in WAYS.items():
            yield {"scored_by": way, "schedule": str(schedule), **answer(schedule, scores_of)}


def report(rows: list[dict], args: FixedArguments):
    print(f"| schedule | scored by | mean | {' | '.join(KINDS)} |\n|{'---|' * (3 + len(KINDS))}")
    for row in rows:
        values = [row["accuracy"], *(row[f"accuracy_{kind}"] for kind in KINDS)]
        print(f"| {row['schedule']} | {row['scored_by']} | {' | '.join(f'{value:.1%}' for value in values)} |")


def main(argv: list[str] | None = None) -> list[dict]:
    return run_benchmark(FixedArguments, __doc__, measure, report, argv)


if __name__ == "__main__":
    main()
