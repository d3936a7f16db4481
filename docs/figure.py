"""
Draw accuracy over operations from the rows of `docs/results/pictures.json`: `python docs/figure.py`.

A point is the mean over the seeds of rows that are equal in contestant, schedule, pixels and steps; its line goes from
the smallest to the largest. The gray band is one point below the unpruned model.
"""

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import DOCS, Rows, group, read


FILE = DOCS / "accuracy_over_operations.png"
PANELS = {"operations_1": "One text per image", "operations_5": "Five texts per image"}
COLORS = ("#000000", "#d9480f", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by the color-blind


def draw_contestant(axes: Axes, rows: Rows, cost: str, color: str):
    """Draw the points of a contestant, joined in the order of their operations."""
    points = []
    for (schedule, pixels, _), runs in group(rows, ["schedule", "pixels", "steps"]).items():
        results = [100 * row["test_accuracy"] for row in runs]
        point = (runs[0][cost], mean(results))
        points.append(point)
        axes.vlines(point[0], min(results), max(results), color=color)
        label = f"{pixels} px" if schedule == "unpruned" else f"{runs[0]['patches']} patches"
        axes.annotate(
            label,
            point,
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=7,
            color=color,
        )
    operations, accuracies = zip(*sorted(points))
    axes.plot(
        operations,
        accuracies,
        color=color,
        marker="o",
        label=rows[0]["contestant"],
    )


def draw(rows: Rows, path: Path):
    """Draw all contestants, with one panel for each number of texts per image."""
    contestants = group(rows, ["contestant"])
    unpruned = mean(100 * row["test_accuracy"] for row in contestants[("unpruned",)])
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharex=True, sharey=True)
    for axes, (cost, title) in zip(panels, PANELS.items()):
        axes.axhspan(unpruned - 1, unpruned, color="#dddddd")
        for color, runs in zip(COLORS, contestants.values()):
            draw_contestant(axes, runs, cost, color)
        axes.set_title(title)
        axes.set_xlabel("operations, unpruned = 1")
    panels[0].margins(x=0.15)  # for the labels
    panels[0].set_ylabel("right answers, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path)


if __name__ == "__main__":
    draw(read("pictures"), FILE)
