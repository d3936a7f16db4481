"""
Draw accuracy over operations from the rows of `docs/results`: `python docs/figure.py`.

In the figure of drawn pictures, a point is the mean over the seeds of rows that are equal in contestant, schedule,
pixels and steps; its line goes from the smallest to the largest. The gray band is one point below the unpruned model.
In the figure of generative models, a point is the mean over the seeds of a selection with a budget of tokens.
"""

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import DOCS, SETTINGS, Rows, group, percents, read


PANELS = {"operations_1": "one text per image", "operations_5": "five texts per image"}
MARKERS = "os^"
# Told apart by the color-blind.
COLORS = ("#000000", "#d9480f", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def style_of(number: int) -> dict[str, str]:
    """Return color and marker of the line with this number."""
    marker_number, color_number = divmod(number, len(COLORS))
    return {"color": COLORS[color_number], "marker": MARKERS[marker_number]}


def draw_contestant(axes: Axes, rows: Rows, cost: str, style: dict[str, str]):
    """Draw the points of a contestant, joined in the order of their operations."""
    points = []
    for (schedule, pixels, _), runs in group(rows, ["schedule", "pixels", "steps"]).items():
        results = [100 * row["test_accuracy"] for row in runs]
        point = (runs[0][cost], mean(results))
        points.append(point)
        axes.vlines(point[0], min(results), max(results), color=style["color"])
        label = f"{pixels} px" if schedule == "unpruned" else f"{runs[0]['patches']} patches"
        axes.text(*point, f"   {label}", fontsize=7, color=style["color"])
    operations, accuracies = zip(*sorted(points))
    axes.plot(
        operations,
        accuracies,
        label=rows[0]["contestant"],
        **style,
    )


def draw_panel(axes: Axes, rows: Rows, cost: str, styles: dict[tuple, dict[str, str]]):
    """Draw all contestants on pictures of one kind, for a number of texts per image."""
    contestants = group(rows, ["contestant"])
    unpruned = mean(100 * row["test_accuracy"] for row in contestants[("unpruned",)])
    axes.axhspan(unpruned - 1, unpruned, color="#dddddd")
    for name, runs in contestants.items():
        draw_contestant(axes, runs, cost, styles[name])
    axes.set_title(f"{rows[0]['pictures']}, {PANELS[cost]}")
    axes.set_xlabel("operations, unpruned = 1")
    axes.set_ylabel("right answers, %")
    axes.margins(x=0.15)  # for the labels


def draw(rows: Rows, path: Path):
    """Draw a row for each kind of pictures with a panel for each number of texts per image."""
    styles = {}
    for number, name in enumerate(group(rows, ["contestant"])):
        styles[name] = style_of(number)
    kinds = group(rows, ["pictures"])
    figure = Figure(figsize=(10, 3.5 * len(kinds)), layout="constrained")
    panels = figure.subplots(
        nrows=len(kinds),
        ncols=len(PANELS),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for row_of_panels, runs in zip(panels, kinds.values()):
        for axes, cost in zip(row_of_panels, PANELS):
            draw_panel(axes, runs, cost, styles)
    handles = {}  # by their labels
    for axes in panels[:, 0]:
        handles |= {line.get_label(): line for line in axes.get_lines()}
    figure.legend(handles=handles.values(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def draw_selections(rows: Rows, path: Path):
    """Draw the selections of generative models, each joined over its budgets of tokens."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    selections = group(rows, ["selection"])
    unpruned = mean(row["total_mmacs"] for row in selections[("unpruned",)])
    for number, ((name,), runs) in enumerate(selections.items()):
        points = []
        for budget in group(runs, ["level"]).values():
            operations = mean(row["total_mmacs"] for row in budget)
            accuracy = mean(percents(budget, "mean").values())
            points.append((operations / unpruned, accuracy))
        operations, accuracies = zip(*sorted(points))
        axes.plot(
            operations,
            accuracies,
            label=SETTINGS["words"]["selection"].get(name, name),
            **style_of(number),
        )
    axes.set_xlabel("operations of a question, unpruned = 1")
    axes.set_ylabel("right answers, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(read("pictures"), DOCS / "accuracy_over_operations.png")
    draw_selections(read("vlm_methods"), DOCS / "vlm_methods.png")
