"""
Draw accuracy against cost for the ways of `docs/results/vlm_answers.json`.

    python docs/draw_vlm_answers.py    # rewrites docs/vlm_answers.png
"""

from argparse import ArgumentParser
from statistics import mean, stdev

from matplotlib.figure import Figure
from tables import DOCS, percents, read, variants


WAYS = {
    "guide from answers": "TextGuide, from answers",
    "guide from regions": "TextGuide, from regions",
    "guide from attention": "TextGuide, from attention",
    "guide from constant": "the same query for all texts, from answers",
    "image at equal cost": "image, best earlier layer",
    "random at equal cost": "random, first layer",
    "diversity, exit": "diversity, after the tower",
    "FastV": "FastV",
    "fewer pixels": "48 and 60 px, whole model trained further",
}


def main(argv: list[str] | None = None):
    ArgumentParser(description=__doc__).parse_args(argv)
    runs = variants(read("vlm_answers"))
    unpruned = mean(row["total_mmacs"] for row in runs["unpruned"])

    def points(names: list[str]) -> list[list[float]]:
        accuracies = [percents(runs[name], "mean") for name in names]
        costs = [mean(row["total_mmacs"] for row in runs[name]) / unpruned for name in names]
        return [costs, [mean(values) for values in accuracies], [stdev(values) for values in accuracies]]

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (way, label) in enumerate(WAYS.items()):
        names = [name for name in runs if name.rpartition(" ")[0] == way]
        costs, heights, errors = points(names)
        axes.errorbar(costs, heights, errors, marker="osv^Dx+*P"[number], markersize=5, capsize=2, label=label)
    costs, heights, errors = points(["unpruned"])
    axes.errorbar(costs, heights, errors, fmt="ks", capsize=2, label="unpruned")
    axes.set(xlabel="operations of one question, over the unpruned model's", ylabel="answers that are right, %")
    axes.set_xlim(0, 1.05)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(DOCS / "vlm_answers.png", dpi=120)


if __name__ == "__main__":
    main()
