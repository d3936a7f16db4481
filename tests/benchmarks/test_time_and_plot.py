"""`benchmarks/time_checkpoints.py` and `benchmarks/plot_ablation.py`: times and figures of trained variants."""

import json

import plot_ablation
import pytest
import time_checkpoints
from matplotlib import pyplot
from safetensors.torch import load_file

from modeling_trips.inspection.speed import CLOCKS


def row(variant: str, seed: int, accuracy: float, history=()) -> dict:
    return {"variant": variant, "seed": seed, "eval_accuracy": accuracy, "history": list(history)}


def times(path, **seconds) -> str:
    """Set the seconds of a forward pass by checkpoint; a training step takes three times as long."""
    rows = [
        {"checkpoint": name.replace("_", "-"), "forward_seconds": value, "training_seconds": 3 * value}
        for name, value in seconds.items()
    ]
    path.write_text(json.dumps(rows))
    return str(path)


def arguments(**fields):
    return plot_ablation.PlotArguments(**{"kind": "curves", "rows": "", "output": "", **fields})


def test_checkpoints_alternate_and_medians_exclude_warmup(checkpoints, tmp_path, monkeypatch):
    folders = [str(checkpoints[name]) for name in ("TripsForQuestionAnswering", "TripsForVisualGrounding")]
    weights = [load_file(f"{folder}/model.safetensors") for folder in folders]
    order = []

    def timed(step, device):
        step()
        order.append(step)
        return float(len(order))

    monkeypatch.setitem(CLOCKS, "process", timed)
    options = ["--checkpoints", *folders, "--batch_size=2", "--texts_per_image=2", "--text_length=6", "--warmup=1"]
    options += ["--repeats=3", "--clock=process"]
    rows = time_checkpoints.main([*options, f"--output_json={tmp_path / 'times.json'}"])
    assert json.loads((tmp_path / "times.json").read_text()) == rows
    # Four steps a round: two checkpoints, each forward and training; the rounds 2 to 4 are steps 5 to 16.
    assert [(row["forward_seconds"], row["training_seconds"]) for row in rows] == [(9.0, 10.0), (11.0, 12.0)]
    assert [row["checkpoint"] for row in rows] == ["TripsForQuestionAnswering", "TripsForVisualGrounding"]
    for folder, before in zip(folders, weights):
        assert all((before[name] == after).all() for name, after in load_file(f"{folder}/model.safetensors").items())
    order.clear()
    rows = time_checkpoints.main([*options, "--training=False"])
    assert [row["forward_seconds"] for row in rows] == [5.0, 6.0]
    assert not any("training_seconds" in row for row in rows)


def test_variants_that_differ_in_the_last_word_form_a_line(tmp_path):
    rows = [row("text 0.25", 0, 0.90), row("text 0.25", 1, 0.94), row("text 0.5", 0, 0.96), row("text 0.5", 1, 0.96)]
    rows += [row("unpruned", 0, 0.98), row("unpruned", 1, 0.98)]
    path = times(tmp_path / "times.json", **{"text_0.25_seed0": 1.0, "text_0.5_seed0": 1.5, "unpruned_seed0": 2.0})
    _, axes = pyplot.subplots()
    plot_ablation.draw_curves(axes, rows, arguments(times=path))
    lines = {container.get_label(): container[0] for container in axes.containers}
    assert lines.keys() == {"text", "unpruned"}
    assert lines["text"].get_xdata().tolist() == [0.5, 0.75]
    assert lines["text"].get_ydata().tolist() == pytest.approx([92.0, 96.0])
    (bars,) = axes.containers[0][2]
    (low, high), _ = (segment[:, 1] for segment in bars.get_segments())
    assert (high - low) / 2 == pytest.approx(100 * 0.04 / 2**0.5)  # standard deviation of 0.90 and 0.94


def test_learning_curves_use_measured_step_times(tmp_path):
    history = [{"epoch": 1, "step": 100, "eval_accuracy": 0.5}, {"epoch": 2, "step": 200, "eval_accuracy": 0.8}]
    path = times(tmp_path / "times.json", unpruned_seed0=0.2)
    _, axes = pyplot.subplots()
    plot_ablation.draw_learning(axes, [row("unpruned", 0, 0.8, history)], arguments(kind="learning", times=path))
    (line,) = axes.lines
    assert line.get_xdata().tolist() == pytest.approx([1.0, 2.0])  # 100 steps of 0.6 seconds are a minute
    assert line.get_ydata().tolist() == pytest.approx([50.0, 80.0])


def test_epochs_of_seeds_form_one_point(tmp_path):
    path = times(tmp_path / "times.json", unpruned_seed0=0.2)
    rows = [
        row("unpruned", seed, 0.8, [{"epoch": 1, "step": 100 + 50 * seed, "eval_accuracy": 0.5 + 0.2 * seed}])
        for seed in (0, 1)
    ]
    _, axes = pyplot.subplots()
    plot_ablation.draw_learning(axes, rows, arguments(kind="learning", times=path))
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [pytest.approx([1.25, 60.0])]


def test_figure_is_written_and_missing_times_raise(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([row("unpruned", 0, 0.9), row("text 0.5", 0, 0.9)]))
    options = ["--kind=curves", f"--rows={tmp_path / 'rows.json'}", f"--output={tmp_path / 'rates.png'}"]
    path = times(tmp_path / "times.json", unpruned_seed0=1.0)
    with pytest.raises(ValueError, match="text 0.5"):
        plot_ablation.main([*options, f"--times={path}"])
    path = times(tmp_path / "times.json", **{"unpruned_seed0": 1.0, "text_0.5_seed0": 0.5})
    plot_ablation.main([*options, f"--times={path}"])
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="--kind"):
        plot_ablation.main(["--kind=bars", *options[1:], f"--times={path}"])
