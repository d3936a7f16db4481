"""
Plan which layers select, who guides them and what they keep, for so many texts per image and a budget.

    python examples/plan_selection.py --preset base --image_size 384 --texts_per_image 1 2 5 10 --budget 0.8
    python examples/plan_selection.py --model_name_or_path demo/model --text_length 10 --texts_per_image 4 --budget 0.6
    python examples/plan_selection.py --preset base --image_size 384 --texts_per_image 1 10 --budget 0.4 0.75 --plot p.png

Costs are multiply-accumulates of text encoder, vision tower and fusion encoder, as shares of those of the unpruned
model, which shares its vision tower among the texts of an image, too. They are counted, not measured
(benchmarks/benchmark.py measures), and nothing is said of accuracy: a text that chooses early and little has to be
taught, see docs/guidance.md.
"""

import trips_examples  # noqa: F401  # isort: skip

from dataclasses import dataclass, field

from modeling_trips import TripsConfig
from modeling_trips.inspection.plan import PlannedSchedule, SelectionPlan, plan_schedules, plan_selection
from modeling_trips.inspection.schedules import Schedule
from trips_examples.training.parser import make_parser


@dataclass
class PlanArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "A checkpoint: a folder, or on the Hub."})
    preset: str | None = field(
        default=None, metadata={"help": f"A size in its place: {', '.join(TripsConfig.presets())}."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Pixels per side. Default: the model's own."})
    texts_per_image: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Texts that share an image: the budget holds at each number."}
    )
    text_length: int = field(default=40, metadata={"help": "Tokens per text."})
    budget: list[float] = field(
        default_factory=lambda: [0.8],
        metadata={"help": "Largest share of the unpruned model's cost: one, or one per number of texts."},
    )
    min_kept: float = field(
        default=0.1, metadata={"help": "Least share of the image tokens that must leave the vision tower."}
    )
    guided_by_text: bool = field(default=True, metadata={"help": "Whether a text must guide a layer."})
    num_rows: int = field(default=12, metadata={"help": "Rows between the cheapest candidate and the dearest."})
    plot: str | None = field(default=None, metadata={"help": "Write a picture of the named schedules to this file."})


def load_config(args: PlanArguments) -> TripsConfig:
    if (args.model_name_or_path is None) == (args.preset is None):
        raise ValueError("Give either a --model_name_or_path or a --preset.")
    if args.preset is not None:
        config = TripsConfig.from_preset(args.preset)
    else:
        config = TripsConfig.from_pretrained(args.model_name_or_path)
    if args.image_size is not None:
        config.vision_config.image_size = args.image_size
        config.vision_config.validate()
    return config


def named_rows(args: PlanArguments, config: TripsConfig, plan: SelectionPlan) -> dict[str, PlannedSchedule]:
    """The rows that a picture shows: those that the plan names, and the model's own schedule."""
    own = Schedule.of(config.vision_config)
    (row,) = plan_schedules(config, [own], args.texts_per_image, args.text_length)
    named = {"cheapest": plan.cheapest, "most tokens": plan.most_tokens, "the model's own": row}
    return named if own.layers else {name: named[name] for name in ("cheapest", "most tokens")}


def thinned(rows: list[PlannedSchedule], num_rows: int) -> list[PlannedSchedule]:
    """Rows at even steps, the first and the last among them."""
    if len(rows) <= num_rows:
        return rows
    return [rows[round(i * (len(rows) - 1) / (num_rows - 1))] for i in range(num_rows)]


def print_rows(rows: list[PlannedSchedule], names: dict[PlannedSchedule, str]):
    numbers = list(rows[0].ratios)
    width = max(len(str(row.schedule)) for row in rows)
    heads = " ".join(f"{number:>6}" for number in numbers)
    print(f"{'schedule':<{width}}  cost at texts per image:{heads}  tokens: mean, fused")
    for row in rows:
        ratios = " ".join(f"{ratio:6.3f}" for ratio in row.ratios.values())
        tokens = f"{row.mean_tokens:12.1f} {row.fused_tokens:6}"
        print(f"{str(row.schedule):<{width}}  {'':<23}{ratios}  {tokens}  {names.get(row.schedule, '')}")
