"""
Draw accuracy against time on composed scenes, from the rows in `docs/results`.

    python docs/draw_accuracy.py    # docs/accuracy_at_equal_information.png
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from tables import DOCS, percents, read, seconds, variants


PROTOCOL = {  # the beginning of its variants' names and the color of each curve
    "by the text": ("text 0", "tab:blue"),
    "by the image": ("image 0", "tab:orange"),
    "one random set": ("random 0", "tab:gray"),
    "fewer pixels": ("fewer pixels", "tab:green"),
}


def draw(output: Path):
    """Draw the accuracy of questions and boxes against time, with the regions known to all."""
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
        unpruned = mean(percents(runs["unpruned"], "test_accuracy"))
        axis.plot(1, unpruned, "k*", markersize=11, label="unpruned baseline")
        axis.axhline(unpruned, color="black", linewidth=0.6, linestyle=":")
        axis.axvline(1, color="black", linewidth=0.6, linestyle=":")
        title = f"{task.capitalize()}, {texts} text{'s' if texts > 1 else ''} per image"
        axis.set(title=title, xlabel="time of a forward pass (unpruned: 1)", ylabel="accuracy, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(output, dpi=110)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Draw accuracy against time.")
    parser.add_argument("--output_dir", type=Path, default=DOCS, help="Folder of the figure.")
    draw(parser.parse_args(arguments).output_dir / "accuracy_at_equal_information.png")


if __name__ == "__main__":
    main()
