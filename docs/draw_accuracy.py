"""
Draw the results of composed scenes from the rows in `docs/results`: accuracy against time, and against epochs.

    python docs/draw_accuracy.py    # docs/accuracy_at_equal_information.png, _against_time.png, _against_epochs.png
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from tables import DOCS, method, percents, read, seconds, variants


PANELS = {
    "Grounding, 1 text per image": "scenes_grounding_rates",
    "Questions, 4 texts per image": "scenes_vqa_rates",
}
COLORS = {
    "by the text, with supervision": "tab:blue",
    "by the text, without supervision": "tab:purple",
    "by the image": "tab:orange",
    "at random": "tab:gray",
    "unpruned, fewer pixels": "tab:green",
}


PROTOCOL = {  # the beginning of its variants' names and the color of each curve
    "by the text": ("text 0", "tab:blue"),
    "by the image": ("image 0", "tab:orange"),
    "at random": ("random 0", "tab:gray"),
    "fewer pixels": ("fewer pixels", "tab:green"),
}


def finish(axis, title: str, baseline: list[dict], metric: str):
    """Mark the unpruned baseline in a panel of accuracy against time, and name its axes."""
    unpruned = mean(percents(baseline, metric))
    axis.plot(1, unpruned, "k*", markersize=11, label="unpruned baseline")
    axis.axhline(unpruned, color="black", linewidth=0.6, linestyle=":")
    axis.axvline(1, color="black", linewidth=0.6, linestyle=":")
    axis.set(title=title, xlabel="time of a forward pass (unpruned: 1)", ylabel="accuracy, %")


def draw_protocol(output: Path):
    """Accuracy of questions and boxes against time, with the regions known to all."""
    figure = Figure(figsize=(13, 4))
    panels = (("questions", 1), ("questions", 4), ("boxes", 1))
    for axis, (task, texts) in zip(figure.subplots(1, len(panels)), panels):
        runs, times = variants(read(f"protocol_{task}")), read(f"protocol_{task}_times")
        for label, (start, color) in PROTOCOL.items():
            points = [
                (float(time), percents(of, "test_accuracy"))
                for variant, of in sorted(runs.items())
                if variant.startswith(start) and ", no " not in variant and len(of) == 3
                if (time := seconds(times, variant, texts_per_image=texts))
            ]
            columns = [x for x, _ in points], [mean(v) for _, v in points], [stdev(v) for _, v in points]
            axis.errorbar(*columns, color=color, marker="o", capsize=3, label=label)
        title = f"{task.capitalize()}, {texts} text{'s' if texts > 1 else ''} per image"
        finish(axis, title, runs["unpruned"], "test_accuracy")
    save(figure, output)


def group(row: dict) -> str | None:
    """The curve that a run belongs to: those with one selection layer, and the unpruned ones."""
    name = method(row)
    if "px" in name:
        return "unpruned, fewer pixels"
    if not name.startswith("`2:") or "," in name.split("`")[1] or "top-p" in name or "merged" in name:
        return None
    if ":text:" in name:
        return f"by the text, {name.rpartition(', ')[2]}"
    return "by the image" if ":image:" in name else "at random"


def draw_times(output: Path):
    """Accuracy against the time of a forward pass, a curve for each way of selecting."""
    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 2)
    for axis, (title, name) in zip(axes, PANELS.items()):
        curves: dict[str, list] = {label: [] for label in COLORS}
        runs, times = variants(read(name)), read(f"{name}_times")
        for variant, of in runs.items():
            if label := group(of[0]):
                values = percents(of, "eval_accuracy")
                curves[label].append((float(seconds(times, variant)), values))
        for label, points in curves.items():
            color = COLORS[label]
            points.sort()
            axis.plot([x for x, _ in points], [mean(values) for _, values in points], color=color, label=label)
            for x, values in points:
                several = len(values) > 1
                face, spread = (color, stdev(values)) if several else ("white", None)
                axis.errorbar(x, mean(values), spread, color=color, marker="o", markerfacecolor=face, capsize=3)
        finish(axis, title, runs["unpruned"], "eval_accuracy")
    save(figure, output)


def draw_epochs(output: Path):
    """Accuracy after each epoch of models that learn to read scenes."""
    figure = Figure(figsize=(10, 4))
    axes = figure.subplots(1, 2)
    panels = {"Questions": "scenes_learning", "Grounding": "scenes_learning_boxes"}
    for axis, (title, name) in zip(axes, panels.items()):
        for of in variants(read(name)).values():
            curves = [[100 * point["eval_accuracy"] for point in row["history"]] for row in of]
            epochs = range(1, len(curves[0]) + 1)
            values = list(zip(*curves))
            label = method(of[0]).replace("`", "")
            axis.errorbar(
                epochs, [mean(v) for v in values], [stdev(v) for v in values], label=label, marker="o", capsize=3
            )
        axis.set(title=title, xlabel="epoch", ylabel="accuracy, %", xticks=epochs)
    save(figure, output)


def save(figure: Figure, output: Path):
    """Save a figure, with one legend below its panels."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(output, dpi=110)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Draw accuracy against time, and against epochs.")
    parser.add_argument("--output_dir", type=Path, default=DOCS, help="Folder of the figures.")
    folder = parser.parse_args(arguments).output_dir
    draw_protocol(folder / "accuracy_at_equal_information.png")
    draw_times(folder / "accuracy_against_time.png")
    draw_epochs(folder / "accuracy_against_epochs.png")


if __name__ == "__main__":
    main()
