"""
Draw accuracy over operations from the rows of `docs/results`: `python docs/figure.py`.

In the figure of generative models, a point is the mean over the seeds of a selection with a budget of tokens. In the
figure of one checkpoint, a line is a model, run at several rates.
"""

from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import DOCS, Rows, group, percents, read

from modeling_trips import SelectionSchedule, TripsConfig
from modeling_trips.inspection.cost import forward_cost


# Models in the figure of one checkpoint, by what their scores learn from.
EVERY_RATE = {
    "relevance, rates drawn": "one checkpoint, whose training drew rates",
    "relevance": "a checkpoint for each rate",
}
COMMON_START = "captions, one start (commit 2d4792e)"
TEXT_LENGTH = 12  # tokens of a question
MARKERS = "os^"
# Told apart by the color-blind.
COLORS = ("#000000", "#d9480f", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def style_of(number: int) -> dict[str, str]:
    """Return color and marker of the line with this number."""
    marker_number, color_number = divmod(number, len(COLORS))
    return {"color": COLORS[color_number], "marker": MARKERS[marker_number]}


def draw_line(axes: Axes, points: list[tuple[float, list[float]]], name: str, number: int):
    """Join points of operations and of accuracies by start, the accuracies by mean and standard deviation."""
    operations, accuracies = zip(*sorted(points))
    axes.errorbar(
        operations,
        [mean(values) for values in accuracies],
        yerr=[stdev(values) for values in accuracies],
        capsize=2,
        label=name,
        **style_of(number),
    )


def draw_selections(rows: Rows, path: Path):
    """Draw the selections of generative models, each joined over its budgets of tokens, with standard deviations."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    selections = group(rows, ["selection"])
    unpruned = mean(row["total_mmacs"] for row in selections[("unpruned",)])
    for number, ((name,), runs) in enumerate(selections.items()):
        points = []
        for budget in group(runs, ["level"]).values():
            operations = mean(row["total_mmacs"] for row in budget)
            accuracies = list(percents(budget, "mean").values())
            points.append((operations / unpruned, accuracies))
        draw_line(axes, points, name, number)
    axes.set_xlabel("operations of a question, unpruned = 1")
    axes.set_ylabel("right answers, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)


def draw_every_rate(rows: Rows, path: Path):
    """Draw models at the rates that they run with, with standard deviations, over a band for the unpruned twins."""
    config = TripsConfig.from_pretrained(DOCS.parent / "examples" / "trips-tiny-scenes-unpruned")
    num_patches = max(row["patches"] for row in rows)
    unpruned_cost = forward_cost(config, TEXT_LENGTH).macs(texts_per_image=1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    unpruned = [row for row in rows if not row["learns_from"]]
    accuracies = percents(unpruned, "mean_with_marks").values()
    lowest = mean(accuracies) - stdev(accuracies)
    highest = mean(accuracies) + stdev(accuracies)
    axes.axhspan(
        lowest,
        highest,
        color="#dddddd",
        label="trained unpruned",
    )
    operations = {}  # by the number of patches
    for patches in sorted({row["patches"] for row in rows}):
        schedule = SelectionSchedule.parse(f"2:text:{(patches - 0.5) / num_patches:.4f}")  # rounded up
        cost = forward_cost(config, TEXT_LENGTH, schedule)
        operations[cost.num_kept] = cost.macs(texts_per_image=1) / unpruned_cost
    for number, (learns_from, name) in enumerate(EVERY_RATE.items(), start=1):
        runs = [row for row in rows if row["learns_from"] == learns_from]
        points = []
        for (patches,), rate in group(runs, ["patches"]).items():
            accuracies = list(percents(rate, "mean_with_marks").values())
            points.append((operations[patches], accuracies))
        draw_line(axes, points, name, number)
    for patches, cost in operations.items():
        axes.annotate(
            str(patches),
            xy=(cost, axes.get_ylim()[0]),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right" if patches == 1 else "left",
        )
    axes.set_xlabel(f"operations of a question, unpruned = 1; patches kept of {num_patches} above the axis")
    axes.set_ylabel("right answers, %")
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    from_captions = [row for row in read("marks") if row["starts_from"] == COMMON_START]
    draw_every_rate(from_captions, DOCS / "one_checkpoint.png")
    draw_selections(read("vlm_methods"), DOCS / "vlm_methods.png")
