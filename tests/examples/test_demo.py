"""`examples/demo.py` from one end to the other, with a model that has hardly been trained."""

import json
import re
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from modeling_trips import TripsForQuestionAnswering, TripsProcessor
from trips_examples import demo
from trips_examples.ask import QUESTIONS
from trips_examples.data.busy_scenes import KINDS


TRAINED = ("one", "few", "start", "model")


@pytest.mark.slow
def test_the_demo_starts_from_an_accurate_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo.main("--max_steps 2 --train_scenes 60 --test_scenes 40".split())
    run = json.loads(Path("demo/results.json").read_text())
    assert not run["from_scratch"]
    assert all(run[f"unpruned_{kind}"] > 0.9 and run[f"pruned_{kind}"] < 0.8 for kind in KINDS)


@pytest.mark.slow
def test_demo_answers_draws_measures_and_publishes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = "--max_steps 8 --train_scenes 60 --test_scenes 8 --from_scratch --publish_to shipped/tiny".split()
    demo.main(options)
    printed = capsys.readouterr().out
    assert all(printed.count(f"  {question} ") == 1 for question in QUESTIONS)
    for line in ("all patches", "pruned, before training", "pruned, trained from answers"):
        assert re.search(rf"^  {line} +([\d.]+% *){{5}}$", printed, re.MULTILINE), line
    # No stage has seen a region, and only the last two drop patches.
    stages = list(demo.STAGES)
    results = {stage: json.loads(Path(f"demo/{stage}/all_results.json").read_text()) for stage in stages}
    assert all(results[stage]["regions_used_for"] == "none" for stage in TRAINED)
    assert [stage for stage in stages if "test_layer2_kept" in results[stage]] == ["pruned", "model"]
    processors = (TripsProcessor.from_pretrained(f"demo/{stage}") for stage in TRAINED)
    assert [processor.image_processor.size["height"] for processor in processors] == [24, 48, 96, 96]
    run = json.loads(Path("demo/results.json").read_text())
    assert run["model_color"] == results["model"]["test_accuracy_color"] and run["seed"] == 42 and run["command"]
    # One row of panels per selection layer: the picture shows the original and the questions.
    with PIL.Image.open(tmp_path / "demo/kept_patches.png") as picture:
        assert picture.width > 600 and len(picture.convert("RGB").getcolors(10**6)) > 20

    # What is shipped are the trained models, rounded to bfloat16, and their cards say so.
    for stage, folder in (("model", "shipped/tiny"), ("start", "shipped/tiny-unpruned")):
        shipped = TripsForQuestionAnswering.from_pretrained(folder)
        trained = load_file(f"demo/{stage}/model.safetensors")
        for name, weight in load_file(f"{folder}/model.safetensors").items():
            assert weight.dtype == (torch.bfloat16 if trained[name].is_floating_point() else torch.int64), name
            assert torch.equal(weight, trained[name].to(weight.dtype)), name
            assert torch.equal(shipped.state_dict()[name], weight.to(trained[name].dtype)), name
        card = (tmp_path / folder / "README.md").read_text()
        assert f"Made by `python examples/demo.py {' '.join(options)}`." in card
        assert "busy scenes, test, 64 examples" in card and "bfloat16" in card
        assert re.search(r"^Computed in float32 on .* \([A-Z0-9]+\)\.$", card, re.MULTILINE)
