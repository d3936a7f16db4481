"""The picture of a run: the course of the training."""

from pathlib import Path

from modeling_trips.inspection.files import whole_file


# Endings of losses, times and counts.
TECHNICAL = ("_loss", "_runtime", "_per_second", "_samples", "_images")


def plot_training(history: list[dict], path: Path, unpruned_steps: int = 0, majority: float | None = None):
    """
    Draw the training loss over steps, that of relevance if there is one, and the first metric of the evaluations if
    there are two after different steps.

    Args:
        history (`list[dict]`): The `TrainerState.log_history`.
        path (`Path`): The picture.
        unpruned_steps (`int`, *optional*, defaults to 0): Number of steps after which pruning begins; a line.
        majority (`float`, *optional*): Accuracy of the most frequent answer; a line beside the metric.
    """
    from matplotlib.figure import Figure  # slow to import

    names = ["loss"]
    if any("relevance_loss" in entry for entry in history):
        names.append("relevance_loss")
    evaluated = (name for entry in history for name in entry if name.startswith("eval_"))
    metric = next((name for name in evaluated if not name.endswith(TECHNICAL)), None)
    if metric is not None and len({entry["step"] for entry in history if metric in entry}) > 1:
        names.append(metric)
    figure = Figure(figsize=(5 * len(names), 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        axes.plot(*zip(*points), marker="." if len(points) < 30 else "")
        axes.set(xlabel="step", ylabel=name.replace("_", " "))
        axes.grid(alpha=0.3)
        if unpruned_steps:
            axes.axvline(unpruned_steps, color="black", linestyle="--", label="pruned from here on")
        if majority is not None and name == metric:
            axes.axhline(majority, color="gray", linestyle=":", label="the most frequent answer")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    with whole_file(path) as partial:
        figure.savefig(partial)
