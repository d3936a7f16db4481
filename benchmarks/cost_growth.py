"""
How the cost of a forward pass grows: with the image's size, the text's length, the batch and the texts per image.

    python benchmarks/cost_growth.py --output_json growth.json --plot growth.png
    python benchmarks/cost_growth.py --schedule 5,10 --max_gmacs 2000 --repeats 5

One quantity grows at a time, from one image of --image_size with one text of --text_length tokens. Every point is
counted by the closed formula of `modeling_trips.inspection.cost`; those of at most --max_gmacs multiply-accumulates of
the unpruned twin are measured, too, pruned and unpruned in turns. The law next to them, seconds = overhead + MACs /
rate, is fitted to all measured points, of all schedules and of the twin.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy
import torch
from tqdm.auto import tqdm

from modeling_trips import UNPRUNED, SelectionSchedule, TripsConfig
from modeling_trips.inspection.cost import forward_cost
from modeling_trips.inspection.speed import Setting, measure
from trips_examples.training.files import write_json
from trips_examples.training.parser import make_parser


AXES = {
    "image_size": "pixels per side",
    "text_length": "tokens per text",
    "batch_size": "images per batch",
    "texts_per_image": "texts per image",
}


@dataclass
class GrowthArguments:
    preset: str = field(default="base", metadata={"help": f"Model size: {', '.join(TripsConfig.presets())}."})
    schedule: list[str] = field(
        default_factory=lambda: ["5,10", "3:image:0.7,6:image:0.7,9:image:0.7,12:text:0.3"],
        metadata={"help": "Selection layers, with guidance and keep rate where they are not text and 0.7."},
    )
    image_size: int = field(default=384, metadata={"help": "Pixels per side where another quantity grows."})
    text_length: int = field(default=40, metadata={"help": "Tokens per text where another quantity grows."})
    image_sizes: list[int] = field(
        default_factory=lambda: [224, 384, 512, 640, 768, 896], metadata={"help": "Pixels per side to try."}
    )
    text_lengths: list[int] = field(
        default_factory=lambda: [16, 40, 64, 128, 256], metadata={"help": "Tokens per text to try."}
    )
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32, 64], metadata={"help": "Images per batch to try."}
    )
    texts_per_image: list[int] = field(
        default_factory=lambda: [1, 2, 5, 10, 20, 50], metadata={"help": "Numbers of texts per image to try."}
    )
    max_gmacs: float = field(default=500.0, metadata={"help": "Measure where the unpruned twin costs no more."})
    num_threads: int = field(default=1, metadata={"help": "CPU threads."})
    clock: str = field(default="wall", metadata={"help": "wall; or process: the processor's time, for one thread."})
    warmup: int = field(default=1, metadata={"help": "Steps of each twin before any is timed."})
    repeats: int = field(default=3, metadata={"help": "Timed steps of each twin."})
    output_json: str | None = field(default=None, metadata={"help": "Write one row per point to this file."})
    plot: str | None = field(default=None, metadata={"help": "Write a picture to this file."})


def settings_of(args: GrowthArguments) -> list[tuple[str, SelectionSchedule, Setting]]:
    """What is tried: the quantity that grows, the schedule, and the rest."""
    start = {"image_size": args.image_size, "text_length": args.text_length, "batch_size": 1, "texts_per_image": 1}
    values = dict(zip(AXES, (args.image_sizes, args.text_lengths, args.batch_sizes, args.texts_per_image)))
    make = partial(Setting, preset=args.preset, num_threads=args.num_threads, clock=args.clock)
    return [
        (axis, schedule, make(**{**start, axis: value}, **schedule.config_fields))
        for axis in AXES
        for schedule in (SelectionSchedule.parse(text) for text in args.schedule)
        for value in sorted(values[axis])
    ]


def count(setting: Setting, schedule: SelectionSchedule) -> float:
    """Multiply-accumulates of a step."""
    config = TripsConfig.from_preset(setting.preset, image_size=setting.image_size)
    cost = forward_cost(config, setting.text_length, schedule)
    return setting.batch_size * cost.macs(setting.texts_per_image)


def examine(axis: str, schedule: SelectionSchedule, setting: Setting, args: GrowthArguments) -> dict:
    """A row: the counts, and where that is not too much the measured seconds."""
    row = {"axis": axis, "value": getattr(setting, axis), "schedule": str(schedule)}
    row |= {"macs": count(setting, schedule), "unpruned_macs": count(setting, UNPRUNED)}
    if row["unpruned_macs"] > args.max_gmacs * 1e9:
        return {**row, "latency": None, "unpruned_latency": None}
    measured = measure(setting, args.warmup, args.repeats, compare_repeating=False)
    kept = ("latency", "unpruned_latency", "num_threads", "clock", "device_name", "torch_version")
    return {**row, **{name: measured[name] for name in kept}}


def fit_law(rows: list[dict]) -> tuple[float, float, float]:
    """The overhead in seconds, the rate in MACs per second, and R^2, by least squares over the measured points."""
    points = [
        (row[f"{twin}macs"], row[f"{twin}latency"])
        for row in rows
        for twin in ("", "unpruned_")
        if row["latency"] is not None
    ]
    macs, seconds = numpy.array(points).T
    slope, overhead = numpy.polyfit(macs, seconds, 1)
    return float(overhead), float(1 / slope), float(numpy.corrcoef(macs, seconds)[0, 1] ** 2)


def describe(law: tuple[float, float, float]) -> str:
    overhead, rate, r_squared = law
    return f"seconds = {overhead:.3f} + MACs / {rate / 1e9:.1f} GMAC/s (R\u00b2 {r_squared:.4f})"


def plot_rows(rows: list[dict], law: tuple[float, float, float], path: str):
    """A panel for each quantity: lines of the law at what is counted, points of what was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    overhead, rate, _ = law
    schedules = list(dict.fromkeys(row["schedule"] for row in rows))
    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    for axes, (axis, title) in zip(panels.flat, AXES.items()):
        curves = [("unpruned, shared", "unpruned_", schedules[0]), *((name, "", name) for name in schedules)]
        for number, (name, twin, schedule) in enumerate(curves):
            points = [row for row in rows if row["axis"] == axis and row["schedule"] == schedule]
            values = [row["value"] for row in points]
            color = "black" if twin else f"C{number - 1}"
            axes.plot(values, [overhead + row[f"{twin}macs"] / rate for row in points], color=color, label=name)
            axes.plot(values, [row[f"{twin}latency"] for row in points], "o", markersize=4, color=color)
        axes.set(xlabel=title, ylabel="seconds per forward pass", xscale="log", yscale="log")
        axes.set_xticks(sorted({row["value"] for row in rows if row["axis"] == axis}))
        axes.get_xaxis().set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.suptitle(f"points measured, lines: {describe(law)}")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> list[dict]:
    (args,) = make_parser(GrowthArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    torch.set_num_threads(args.num_threads)
    rows = [examine(*point, args) for point in tqdm(settings_of(args), desc="points")]
    if not any(row["latency"] for row in rows):
        raise ValueError(f"Nothing costs at most {args.max_gmacs:g} GMACs: raise --max_gmacs.")
    law = fit_law(rows)
    for row in rows:
        time = "not measured" if row["latency"] is None else f"{row['latency']:.3f} s ({row['unpruned_latency']:.3f})"
        gmacs = f"{row['macs'] / 1e9:.1f} GMACs (unpruned {row['unpruned_macs'] / 1e9:.1f})"
        print(f"{AXES[row['axis']]} {row['value']}, {row['schedule']}: {gmacs}, {time}")
    print(describe(law))
    if args.output_json is not None:
        write_json(args.output_json, rows)
    if args.plot is not None:
        plot_rows(rows, law, args.plot)
    return rows


if __name__ == "__main__":
    main()
