"""
Draw accuracy over operations from the rows of `docs/results`: `python docs/figure.py`.

In the figure of drawn pictures, a point is one training, and a line joins those of a contestant. The gray band is one
point below the unpruned model. In the figure of generative models, a point is the mean over the seeds of a selection
with a budget of tokens. In the figure of one checkpoint, a line is a model, run at several rates.
"""

from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import DOCS, Rows, group, percents, read

from modeling_trips import SelectionSchedule, TripsConfig
from modeling_trips.inspection.cost import forward_cost


# Rows of `pictures.json` that one figure compares: trainings with equal steps from one start.
COMPARED = {"pictures": "emoji scenes", "steps": 1250, "seed": 42, "precision": "bfloat16 mixed"}
# Selections in the figure of the README.
HEADLINE = {
    "unpruned",
    "divprune, after the tower",
    "random, after the tower",
    "image in layer 3",
    "guide from answers",
}
# Models in the figure of one checkpoint, by what their scores learn from.
EVERY_RATE = {
    "relevance in every eighth step, rates drawn": "trained with rates that are drawn",
    "relevance in every eighth step": "trained with 1 patch",
}
COMMON_START = "captions, one start (commit 2d4792e)"
TEXT_LENGTH = 12  # tokens of a question
PANELS = {"operations_1": "one text per image", "operations_5": "five texts per image"}
MARKERS = "os^"
# Told apart by the color-blind.
COLORS = ("#000000", "#d9480f", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def style_of(number: int) -> dict[str, str]:
    """Return color and marker of the line with this number."""
    marker_number, color_number = divmod(number, len(COLORS))
    return {"color": COLORS[color_number], "marker": MARKERS[marker_number]}


def size_of(row: dict) -> str:
    """Return in words what the model of a row reads."""
    if row["schedule"] == "unpruned":
        return f"{row['pixels']} px"
    return f"{row['patches']} patches"


def name_points(axes: Axes, rows: Rows, cost: str, color: str):
    """Write beside each point what its model reads."""
    for row in rows:
        axes.annotate(
            size_of(row),
            xy=(row[cost], 100 * row["test_accuracy"]),
            xytext=(6, 6),
            textcoords="offset points",
            fontsize=7,
            color=color,
        )


def draw_panel(axes: Axes, rows: Rows, cost: str):
    """Draw all contestants for a number of texts per image."""
    contestants = group(rows, ["contestant"])
    unpruned = max(100 * row["test_accuracy"] for row in contestants[("unpruned",)])
    axes.axhspan(unpruned - 1, unpruned, color="#dddddd")
    for number, ((name,), runs) in enumerate(contestants.items()):
        runs = sorted(runs, key=lambda row: row[cost])
        style = style_of(number)
        label = name
        if len(runs) == 1:
            label = f"{name} ({size_of(runs[0])})"
        else:
            name_points(axes, runs, cost, style["color"])
        axes.plot(
            [row[cost] for row in runs],
            [100 * row["test_accuracy"] for row in runs],
            label=label,
            **style,
        )
    axes.set_title(PANELS[cost])
    axes.set_xlabel("operations, unpruned = 1")
    axes.set_ylabel("right answers, %")
    axes.margins(x=0.1)  # for the names of the points


def draw(rows: Rows, path: Path):
    """Draw a panel for each number of texts per image."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(
        ncols=len(PANELS),
        sharex=True,
        sharey=True,
    )
    for axes, cost in zip(panels, PANELS):
        draw_panel(axes, rows, cost)
    handles, _ = panels[0].get_legend_handles_labels()
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2,
    )
    figure.savefig(path, dpi=120)


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
            accuracies = percents(budget, "mean").values()
            points.append((operations / unpruned, mean(accuracies), stdev(accuracies)))
        operations, accuracies, deviations = zip(*sorted(points))
        axes.errorbar(
            operations,
            accuracies,
            yerr=deviations,
            capsize=2,
            label=name,
            **style_of(number),
        )
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
    twins = percents([row for row in rows if not row["learns_from"]], "mean_with_marks").values()
    axes.axhspan(mean(twins) - stdev(twins), mean(twins) + stdev(twins), color="#dddddd", label="trained unpruned")
    for number, (learns_from, name) in enumerate(EVERY_RATE.items()):
        runs = [row for row in rows if row["learns_from"] == learns_from]
        points = []
        for (patches,), rate in group(runs, ["patches"]).items():
            schedule = SelectionSchedule.parse(f"2:text:{patches / num_patches:.4f}")
            cost = forward_cost(config, TEXT_LENGTH, schedule).macs(texts_per_image=1)
            accuracies = percents(rate, "mean_with_marks").values()
            points.append((cost / unpruned_cost, mean(accuracies), stdev(accuracies), patches))
        operations, accuracies, deviations, patches = zip(*sorted(points))
        style = style_of(number + 1)
        axes.errorbar(operations, accuracies, yerr=deviations, capsize=2, label=name, **style)
    for cost, count in zip(operations, patches):
        axes.annotate(
            str(count),
            xy=(cost, axes.get_ylim()[0]),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right" if count == min(patches) else "left",
        )
    axes.set_xlabel(f"operations of a question, unpruned = 1; patches kept of {num_patches} above the axis")
    axes.set_ylabel("right answers, %")
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    compared = [row for row in read("pictures") if COMPARED.items() <= row.items()]
    draw(compared, DOCS / "accuracy_over_operations.png")
    from_captions = [row for row in read("marks") if row["starts_from"] == COMMON_START]
    draw_every_rate(from_captions, DOCS / "one_checkpoint.png")
    selections = read("vlm_methods")
    draw_selections(selections, DOCS / "vlm_methods.png")
    draw_selections([row for row in selections if row["selection"] in HEADLINE], DOCS / "kept_tokens.png")
