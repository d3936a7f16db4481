"""
Count the cost of a selection schedule, or propose schedules within a budget.

    python examples/plan_selection.py --model demo/model --schedule 2:text:0.02 2:text:0.1
    python examples/plan_selection.py --preset base --image_size 384 --texts_per_image 1 2 5 10 --budget 0.8

Costs are MACs of text encoder, vision tower and fusion encoder relative to the unpruned model, which also shares its
vision tower among the texts of an image. They are counted, not measured.
"""

from dataclasses import dataclass

from trips_examples.data.source import option
from trips_examples.training.options import make_parser, run_script


@dataclass
class PlanArguments:
    model: str | None = option(None, "Checkpoint: a folder, or a name on the Hub.")
    preset: str | None = option(None, "Size in place of a checkpoint: tiny, small or base.")
    schedule: list[str] = option([], "Schedules to count, as in 2:text:0.02. Default: propose some.")
    image_size: int | None = option(None, "Pixels per side. Default: the model's own.")
    texts_per_image: list[int] = option([1], "Texts per image; the budget holds for each number.")
    text_length: int = option(40, "Tokens per text.")
    budget: float = option(0.9, "Largest share of the unpruned cost.")

    def __post_init__(self):
        if (self.model is None) == (self.preset is None):
            raise ValueError("Give either a --model or a --preset.")


OPTIONS = make_parser(PlanArguments, description=__doc__, script=__name__)

import torch

from modeling_trips import SelectionSchedule, TripsConfig
from modeling_trips.inspection.plan import PlannedSchedule, plan_schedules, plan_selection


MAX_ROWS = 12  # proposals, at even steps of the cost


def print_rows(rows: list[PlannedSchedule]):
    width = max(len("schedule"), *(len(str(row.schedule)) for row in rows))
    numbers = " ".join(f"{number:>6}" for number in rows[0].ratios)
    print(f"{'schedule':<{width}}  mean tokens  last tokens  cost at{numbers} text(s) per image")
    for row in rows:
        ratios = " ".join(f"{ratio:6.3f}" for ratio in row.ratios.values())
        print(f"{row.schedule!s:<{width}}  {row.mean_tokens:11.1f}  {row.cost.tokens[-1]:11}         {ratios}")
    print(
        "mean tokens: image tokens per layer; last tokens: those that the fusion encoder reads; cost: share of the "
        "unpruned model's operations.\nNone of this says anything about accuracy: measure it before you choose."
    )


def main(argv: list[str] | None = None) -> list[PlannedSchedule]:
    (args,) = OPTIONS.parse_args_into_dataclasses(args=argv)
    config = TripsConfig.from_preset(args.preset) if args.preset else TripsConfig.from_pretrained(args.model)
    if args.image_size is not None:
        config.vision_config.image_size = args.image_size
        config.vision_config.validate()
    if args.schedule:
        schedules = [SelectionSchedule.parse(text) for text in args.schedule]
        for schedule in schedules:
            schedule.check_fits(config.vision_config.num_hidden_layers)
        rows = plan_schedules(config, schedules, args.texts_per_image, args.text_length)
    else:
        found = plan_selection(config, args.texts_per_image, args.text_length, args.budget)
        if not found:
            raise ValueError(f"No schedule fits --budget {args.budget}. Give a larger one or fewer --texts_per_image.")
        numbers = torch.linspace(0, len(found) - 1, min(MAX_ROWS, len(found))).round()
        rows = [found[int(number)] for number in numbers]
    print_rows(rows)
    return rows


if __name__ == "__main__":
    run_script(main)
