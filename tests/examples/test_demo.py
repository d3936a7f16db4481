"""`examples/demo.py` from one end to the other, with a model that has hardly been trained."""

import re
from pathlib import Path

import pytest
from json_files import read_json
from PIL import Image

from trips_examples import demo
from trips_examples.ask import QUESTIONS
from trips_examples.data.busy_scenes import KINDS


@pytest.mark.slow
def test_demo_answers_draws_and_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = "--max_steps 8 --train_scenes 60 --test_scenes 40".split()
    demo.main(options)
    printed = capsys.readouterr().out
    assert all(printed.count(f"  {question} ") == 1 for question in QUESTIONS)
    for line in ("all patches", "pruned, before training", "pruned, trained from answers"):
        assert re.search(rf"^  {line} +([\d.]+% *){{5}}$", printed, re.MULTILINE), line
    # The training saw no region, and only the last two drop patches.
    stages = list(demo.STAGES)
    results = {stage: read_json(Path(f"demo/{stage}/all_results.json")) for stage in stages}
    assert results["model"]["regions_used_for"] == "none"
    assert [stage for stage in stages if "test_layer2_kept" in results[stage]] == ["pruned", "model"]
    run = read_json(Path("demo/results.json"))
    assert run["model_color"] == results["model"]["test_accuracy_color"] and run["seed"] == 42 and run["command"]
    assert all(run[f"unpruned_{kind}"] > 0.9 and run[f"pruned_{kind}"] < 0.8 for kind in KINDS)
    # One row of panels per selection layer: the picture shows the original and the questions.
    with Image.open(tmp_path / "demo/kept_patches.png") as picture:
        assert picture.width > 600 and len(picture.convert("RGB").getcolors(10**6)) > 20
