"""`examples/evaluate_vlm.py` on questions of a file, and its table."""

import math

import pytest
from json_files import read_json
from loading import write
from strange_pictures import noise
from tiny_vlm_processors import save_tiny_vlm
from tiny_vlms import BY_NAME
from transformers import AutoModelForImageTextToText

from modeling_trips.hosts import TextGuide
from trips_examples import evaluate_vlm
from trips_examples.evaluate_vlm import SELECTIONS, EvaluationArguments, default_layer
from trips_examples.metrics.generation import VisionLanguageModel


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_vlm("idefics3", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def questions(checkpoint, tmp_path_factory):
    """Return a file of questions with the unpruned model's answers as truth, except the last."""
    folder = tmp_path_factory.mktemp("questions")
    vlm = VisionLanguageModel(checkpoint, device="cpu")
    rows = []
    for number in range(4):
        image = noise(64, 64, seed=number)
        image.save(folder / f"{number}.png")
        (answer,) = vlm.answer([image], ["what color ?"])
        rows.append({"image": f"{number}.png", "question": "what color ?", "answer": answer})
    rows[-1]["answer"] = "x"
    return write(folder / "val.jsonl", rows)


def test_questions_are_evaluated_once(checkpoint, questions, tmp_path, capsys, monkeypatch):
    """A selection that the model does not support is named."""
    options = [
        f"--model={checkpoint}",
        f"--validation_file={questions}",
        "--instruction=",
        "--device=cpu",
        "--selections",
        "exit_prompt",
        "fewer_pixels",
        "--visual_tokens=8",
        "--batch_size=2",
        f"--output_json={tmp_path / 'rows.json'}",
    ]
    unpruned, pruned, smaller = evaluate_vlm.main(options)
    assert unpruned["score"] == 0.75
    assert unpruned["num_samples"] == 4
    assert unpruned["score_error"] == pytest.approx(math.sqrt(4 * 0.75 * 0.25 / 3) / 2)
    assert unpruned["different_predictions"] >= 1
    assert unpruned["questions"].startswith("val.jsonl")
    assert unpruned["visual_tokens_per_image"] == 17 * 16  # 17 tiles
    assert pruned["visual_tokens_per_image"] == 17  # a share of each tile is at least one token
    assert 0 <= pruned["score"] <= 1
    assert "Idefics3" in smaller["not_supported"]
    assert smaller["not_supported"] in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_vlm, "evaluate", None)  # it would be called for another row
        assert evaluate_vlm.main(options) == read_json(tmp_path / "rows.json")
    limited, *_ = evaluate_vlm.main([*options, "--limit=2"])
    assert limited["num_samples"] == 2
    questions.write_text(questions.read_text().replace('"x"', '"y"'))
    assert len(evaluate_vlm.main(options)) == 3
    assert len(read_json(tmp_path / "rows.json")) == 9  # for other settings, and for other questions


def test_every_selection_keeps_about_the_same_number(questions, tmp_path):
    checkpoint = save_tiny_vlm("llava", tmp_path / "checkpoint")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    TextGuide.for_model(model).save_pretrained(tmp_path / "guide")
    options = [
        f"--model={checkpoint}",
        f"--validation_file={questions}",
        f"--guide={tmp_path / 'guide'}",
        "--device=cpu",
        "--limit=2",
        f"--output_json={tmp_path / 'rows.json'}",
        "--visual_tokens",
        "576",
        "8",
    ]
    unpruned, *rows = evaluate_vlm.main(options)
    assert [row["selection"] for row in rows] == list(SELECTIONS)
    for row in rows:
        assert row["visual_tokens_per_image"] == pytest.approx(8, abs=2)


def test_the_default_layer_is_a_third_of_the_way_or_that_of_the_guide(tmp_path):
    for name in ("qwen2_5_vl", "llava"):
        BY_NAME[name].make().config.save_pretrained(tmp_path / name)
        assert default_layer(tmp_path / name) == 1 == round(BY_NAME[name].num_layers / 3)
    TextGuide(32, 4, 8, layer=7).save_pretrained(tmp_path / "guide")
    assert default_layer("model", str(tmp_path / "guide")) == 7


def test_selections_and_numbers_are_checked():
    for wrong in ({"selections": ["tower_text"]}, {"visual_tokens": [0]}):
        with pytest.raises(ValueError):
            EvaluationArguments(model="model", validation_file="val.jsonl", **wrong)


def test_table_is_relative_to_the_unpruned_model(capsys):
    unpruned = {"selection": "unpruned", "visual_tokens": None, "score": 0.5}
    at_exit = {"selection": "exit_prompt", "visual_tokens": 16, "score": 0.4}
    in_tower = {"selection": "tower_image", "visual_tokens": 16, "score": 0.6}
    refused = {"selection": "fewer_pixels", "visual_tokens": 16, "not_supported": "Tiles."}
    for row, tokens in ((unpruned, 64.0), (at_exit, 16.0), (in_tower, 15.0)):
        row["score_error"] = 0.01
        row["visual_tokens_per_image"] = tokens
    evaluate_vlm.print_table([unpruned, at_exit, in_tower, refused])
    printed = capsys.readouterr().out
    assert "| unpruned | all | 64.0 | 50.0 ± 1.0 | 100.0 |" in printed
    assert "| exit_prompt | 16 | 16.0 | 40.0 ± 1.0 | 80.0 |" in printed
    assert "| tower_image | 16 | 15.0 | 60.0 ± 1.0 | 120.0 |" in printed
    assert "Tiles." in printed
