"""
Draw accuracy over operations from the rows of `docs/results`: `python docs/figure.py`.

In the figure of generative models, a point is the mean over the seeds of a selection with a budget of tokens. In the
figure of one checkpoint, a line is a model, run at several rates. Another has accuracy over the steps of trainings.
"""

from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import DOCS, Rows, group, percents, read


# Models in the figure of one checkpoint, by what their scores learn from.
EVERY_RATE = {
    "relevance, rates drawn": "one checkpoint, whose training drew rates",
    "relevance": "a checkpoint for each rate",
}
BUSY_SCENES = {"starts_from": "captions, one start (commit 2d4792e)"}
PICTURES = {"pictures": "emoji scenes, seeds of data"}
EMOJI_SCENES = {**PICTURES, "steps": 1250}
MARKERS = "os^"
# Told apart by the color-blind.
COLORS = ("#000000", "#d9480f", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def rows_with(name: str, settings: dict) -> Rows:
    """Return the rows of a file that have these values."""
    return [row for row in read(name) if settings.items() <= row.items()]


def style_of(number: int) -> dict[str, str]:
    """Return color and marker of the line with this number."""
    marker_number, color_number = divmod(number, len(COLORS))
    return {"color": COLORS[color_number], "marker": MARKERS[marker_number]}


def draw_line(axes: Axes, runs: dict[float, Rows], result: str, name: str, number: int):
    """Join the points of rows with equal operations, by mean and standard deviation of a result."""
    operations = sorted(runs)
    accuracies = [percents(runs[point], result).values() for point in operations]
    axes.errorbar(
        operations,
        [mean(values) for values in accuracies],
        yerr=[stdev(values) if len(values) > 1 else 0 for values in accuracies],
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
        points = {}
        for budget in group(runs, ["level"]).values():
            operations = mean(row["total_mmacs"] for row in budget)
            points[operations / unpruned] = budget
        draw_line(axes, points, "mean", name, number)
    axes.set(xlabel="operations of a question, unpruned = 1", ylabel="right answers, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)


def draw_rates(axes: Axes, rows: Rows, teacher: str, result: str):
    """Draw models at the rates that they run with over a band for the unpruned twins, with standard deviations."""
    models = group(rows, [teacher])
    unpruned, *_ = models.values()
    accuracies = percents(unpruned, result).values()
    deviation = stdev(accuracies)
    axes.axhspan(
        mean(accuracies) - deviation,
        mean(accuracies) + deviation,
        color="#dddddd",
        label="trained unpruned",
    )
    for number, (learns_from, name) in enumerate(EVERY_RATE.items(), start=1):
        points = {}
        for (operations,), runs in group(models[(learns_from,)], ["operations_1"]).items():
            points[operations] = runs
        draw_line(axes, points, result, name, number)
    costs = {row["patches"]: row["operations_1"] for row in rows}
    for patches, cost in costs.items():
        axes.text(
            cost,
            0.01,
            str(patches),
            ha="right" if patches == min(costs) else "left",
            transform=axes.get_xaxis_transform(),
            in_layout=False,
        )
    axes.set(
        xlabel=f"operations, unpruned = 1; patches of {max(costs)} above the axis",
        ylabel="right answers, %",
    )


def draw_every_rate(busy_scenes: Rows, emoji_scenes: Rows, path: Path):
    """Draw one checkpoint at every rate beside a checkpoint for each rate, on two kinds of pictures."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(ncols=2)
    draw_rates(left, busy_scenes, teacher="learns_from", result="mean_with_marks")
    draw_rates(right, emoji_scenes, teacher="contestant", result="test_accuracy")
    left.set_title("busy scenes, one start")
    right.set_title("emoji scenes, pretrained towers")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def draw_steps(rows: Rows, path: Path):
    """Draw unpruned models and those with 4 of 64 patches over the steps of their trainings, a line for each seed."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    lines = group(rows, ["contestant", "patches", "seed"])
    for (contestant, patches, seed), runs in lines.items():
        if (contestant, patches) in (("unpruned", 64), ("relevance", 4)):
            accuracies = {row["steps"]: 100 * row["test_accuracy"] for row in runs}
            steps = sorted(accuracies)
            name = f"{patches} patches, seed {seed}"
            axes.plot(steps, [accuracies[step] for step in steps], label=name, **style_of(len(axes.lines)))
    axes.set(xlabel="steps", ylabel="right answers, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    busy_scenes = rows_with("marks", BUSY_SCENES)
    emoji_scenes = rows_with("pictures", EMOJI_SCENES)
    draw_every_rate(busy_scenes, emoji_scenes, DOCS / "one_checkpoint.png")
    draw_steps(rows_with("pictures", PICTURES), DOCS / "steps.png")
    draw_selections(read("vlm_methods"), DOCS / "vlm_methods.png")
