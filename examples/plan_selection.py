"""
Plan a selection schedule for a number of texts per image and a budget.

    python examples/plan_selection.py --preset base --image_size 384 --texts_per_image 1 2 5 10 --budget 0.8
    python examples/plan_selection.py --model demo/model --text_length 10 --texts_per_image 4 --budget 0.6
    python examples/plan_selection.py --preset base --texts_per_image 1 10 --budget 0.4 0.75 --plot plan.png

Costs are MACs of text encoder, vision tower and fusion encoder relative to the unpruned model, which also shares its
vision tower among the texts of an image. They are counted, not measured (benchmarks/benchmark.py measures), and say
nothing about accuracy: see docs/choose.md.
"""

import trips_examples  # noqa: F401  # isort: skip

from dataclasses import dataclass, field

from modeling_trips import SelectionSchedule, TripsConfig
from modeling_trips.inspection.files import whole_file
from modeling_trips.inspection.plan import PlannedSchedule, SelectionPlan, plan_schedules, plan_selection
from trips_examples.training.parser import make_parser, run_script


@dataclass
class PlanArguments:
    model: str | None = field(default=None, metadata={"help": "Checkpoint: a folder, or a name on the Hub."})
    preset: str | None = field(
        default=None, metadata={"help": f"Size in place of a checkpoint: {', '.join(TripsConfig.presets())}."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Pixels per side. Default: the model's own."})
    texts_per_image: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Texts per image; the budget holds for each number."}
    )
    text_length: int = field(default=40, metadata={"help": "Tokens per text."})
    budget: list[float] = field(
        default_factory=lambda: [0.9],
        metadata={"help": "Largest share of the unpruned cost: one, or one per number of texts."},
    )
    num_rows: int = field(default=12, metadata={"help": "Rows between the cheapest and the most expensive schedule."})
    plot: str | None = field(default=None, metadata={"help": "Figure of the named schedules to write."})


def load_config(args: PlanArguments) -> TripsConfig:
    if (args.model is None) == (args.preset is None):
        raise ValueError("Give either a --model or a --preset.")
    if args.preset is not None:
        config = TripsConfig.from_preset(args.preset)
    else:
        config = TripsConfig.from_pretrained(args.model)
    if args.image_size is not None:
        config.vision_config.image_size = args.image_size
        config.vision_config.validate()
    return config


def named_rows(args: PlanArguments, config: TripsConfig, plan: SelectionPlan) -> dict[str, PlannedSchedule]:
    """Return the affordable schedules that the plan names, and the model's own schedule, if it has one."""
    own = config.vision_config.schedule
    (row,) = plan_schedules(config, [own], args.texts_per_image, args.text_length)
    named = {"cheapest": plan.cheapest, "most tokens": plan.most_tokens, "the model's own": row}
    return {name: row for name, row in named.items() if row is not None and row.schedule.layers}


def thinned(rows: list[PlannedSchedule], num_rows: int) -> list[PlannedSchedule]:
    """Return rows at even steps, the first and the last among them."""
    if len(rows) <= num_rows:
        return rows
    return [rows[round(i * (len(rows) - 1) / (num_rows - 1))] for i in range(num_rows)]


def print_rows(rows: list[PlannedSchedule], names: dict[SelectionSchedule, str]):
    width = max(len(str(row.schedule)) for row in rows)
    numbers = " ".join(f"{number:>6}" for number in rows[0].ratios)
    print(f"{'schedule':<{width}}  mean tokens  to fusion  cost at{numbers} text(s) per image")
    for row in rows:
        ratios = " ".join(f"{ratio:6.3f}" for ratio in row.ratios.values())
        tokens = f"{row.mean_tokens:11.1f}  {row.cost.tokens[-1]:9}"
        print(f"{str(row.schedule):<{width}}  {tokens}         {ratios} {names.get(row.schedule, '')}".rstrip())


def plot(named: dict[str, PlannedSchedule], plan: SelectionPlan, args: PlanArguments):
    """Draw cost against texts per image, and against tokens."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    by_texts, by_tokens = figure.subplots(1, 2)
    front = [(row.mean_tokens, max(row.ratios.values())) for row in plan.front]
    by_tokens.plot(*zip(*front), ".", color="gray")
    numbers = range(1, max(10, *args.texts_per_image) + 1)
    for number, (name, row) in enumerate(named.items()):
        ratios = [row.cost.macs(n) / plan.unpruned.cost.macs(n) for n in numbers]
        by_texts.plot(numbers, ratios, color=f"C{number}", label=f"{name}: {row.schedule}")
        by_tokens.plot(row.mean_tokens, max(row.ratios.values()), "o", color=f"C{number}")
    for axes in (by_texts, by_tokens):
        axes.axhline(1.0, color="black", linewidth=1)
        axes.grid(alpha=0.3)
    by_texts.plot(args.texts_per_image, budgets_of(args), "v", color="black", label="budget")
    by_texts.set(xlabel="texts per image", ylabel="MAC ratio", ylim=(0, None))
    by_tokens.set(xlabel="mean image tokens per layer", ylabel="largest MAC ratio", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    with whole_file(args.plot) as path:
        figure.savefig(path)


def budgets_of(args: PlanArguments) -> list[float]:
    return args.budget if len(args.budget) > 1 else args.budget * len(args.texts_per_image)


def main(argv: list[str] | None = None) -> SelectionPlan:
    (args,) = make_parser(PlanArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    config = load_config(args)
    plan = plan_selection(config, args.texts_per_image, args.text_length, budgets_of(args))
    named = named_rows(args, config, plan)
    rows = thinned(plan.front, args.num_rows) if plan.affordable else plan.candidates[: args.num_rows]
    rows = list({row.schedule: row for row in (*rows, *named.values())}.values())
    if plan.affordable:
        print(f"{len(plan.candidates)} candidates. None beats these in both cost and tokens, except named ones:")
    else:
        print(f"None of {len(plan.candidates)} candidates fits the budget. The cheapest:")
    rows = sorted(rows, key=lambda row: max(row.ratios.values()))
    print_rows(rows, {row.schedule: name for name, row in named.items()})
    if config.fusion_encoder_config.fusion_type == "single_stream":
        print("In a single stream the texts of an image share no layer, whatever scores the patches.")
    if args.plot is not None:
        plot(named, plan, args)
    return plan


if __name__ == "__main__":
    run_script(main)
