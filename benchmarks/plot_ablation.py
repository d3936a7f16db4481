r"""
Plot results of ablate_selection.py: accuracy against measured time, or accuracy against training time.

    python benchmarks/plot_ablation.py --kind curves --rows rates.json --times times.json --output rates.png
    python benchmarks/plot_ablation.py --kind learning --rows learning.json --times times.json --output learning.png

time_checkpoints.py writes `times.json` for the runs of one seed. In `curves`, variants whose names differ only in the
last word (`text 0.25`, `text 0.5`) form a line, and others are single points. Values are means over the seeds; bars
and bands are one standard deviation.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot

from trips_examples.training.parser import make_parser


REFERENCE = "unpruned"  # variant with relative time 1


@dataclass
class PlotArguments:
    kind: str = field(metadata={"help": "curves: accuracy against time per batch; learning: against training time."})
    rows: str = field(metadata={"help": "Rows of ablate_selection.py."})
    output: str = field(metadata={"help": "Output figure."})
    times: str = field(metadata={"help": "Rows of time_checkpoints.py for the runs of a seed."})
    metric: str = field(default="eval_accuracy", metadata={"help": "Metric of the rows."})
    title: str = field(default="", metadata={"help": "Title of the figure."})


def seconds_by_variant(rows: list[dict], path: str, kind: str) -> dict[str, float]:
    """Return the median time of each variant, for a forward pass or a training step."""
    times = {row["checkpoint"]: row[f"{kind}_seconds"] for row in json.loads(Path(path).read_text())}
    names = {f"{row['variant'].replace(' ', '-')}-seed{row['seed']}": row["variant"] for row in rows}
    seconds = {names[checkpoint]: value for checkpoint, value in times.items() if checkpoint in names}
    if missing := {row["variant"] for row in rows} - seconds.keys():
        raise ValueError(f"{path} has no time of {', '.join(sorted(missing))}. Measure a run of each.")
    return seconds


def spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def draw_curves(axes, rows: list[dict], args: PlotArguments):
    seconds = seconds_by_variant(rows, args.times, "forward")
    values = defaultdict(list)
    for row in rows:
        values[row["variant"]].append(100 * row[args.metric])
    lines = defaultdict(list)
    for variant, own in values.items():
        point = (seconds[variant] / seconds[REFERENCE], mean(own), spread(own))
        lines[variant.rpartition(" ")[0] or variant].append((point, variant))
    for line, points in lines.items():
        label = line if len(points) > 1 else points[0][1]
        x, y, deviations = zip(*sorted(point for point, _ in points))
        style = {"color": "black", "marker": "s"} if label == REFERENCE else {"marker": "o"}
        axes.errorbar(x, y, yerr=deviations, markersize=4, capsize=2, linewidth=1.5, label=label, **style)
    axes.set_xlabel(f"measured time of a batch, relative to {REFERENCE}")


def draw_learning(axes, rows: list[dict], args: PlotArguments):
    seconds = seconds_by_variant(rows, args.times, "training")
    curves = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for entry in row["history"]:
            curves[row["variant"]][round(entry["epoch"], 2)].append((entry["step"], 100 * entry[args.metric]))
    for variant, by_epoch in curves.items():
        # Epochs of different seeds differ by a few steps, because their scenes differ.
        steps, values = zip(*(zip(*by_epoch[epoch]) for epoch in sorted(by_epoch)))
        x = [mean(own) * seconds[variant] / 60 for own in steps]
        means, deviations = [mean(own) for own in values], [spread(own) for own in values]
        (line,) = axes.plot(x, means, marker="o", markersize=3, linewidth=1.5, label=variant)
        low, high = zip(*((m - d, m + d) for m, d in zip(means, deviations)))
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15)
    axes.set_xlabel("minutes of training (steps x measured time of a step)")


def main(argv: list[str] | None = None):
    (args,) = make_parser(PlotArguments, description=__doc__).parse_args_into_dataclasses(args=argv)
    drawings = {"curves": draw_curves, "learning": draw_learning}
    if args.kind not in drawings:
        raise ValueError(f"--kind must be one of {', '.join(drawings)}, got {args.kind!r}.")
    rows = json.loads(Path(args.rows).read_text())
    figure, axes = pyplot.subplots(figsize=(7.5, 5.5), layout="constrained")
    axes.set_prop_cycle(color=[*pyplot.get_cmap("tab10").colors, *pyplot.get_cmap("Dark2").colors])
    drawings[args.kind](axes, rows, args)
    axes.set_ylabel(f"{args.metric.removeprefix('eval_')}, %")
    axes.set_title(args.title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(args.output, dpi=120)


if __name__ == "__main__":
    main()
