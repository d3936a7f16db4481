"""`benchmarks/time_checkpoints.py`: times of trained models."""

import json

import time_checkpoints
from safetensors.torch import load_file

from modeling_trips.inspection.speed import CLOCKS


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
