"""Rows, scores and the table of an evaluation of a vision-language model. lmms/test_vlm.py runs it."""

import json
import math

import pytest
from tiny_vlms import BY_NAME

from modeling_trips import SelectionSchedule
from modeling_trips.hosts import TextGuide
from trips_examples import evaluate_vlm
from trips_examples.evaluate_vlm import EvaluationArguments, default_layer, model_arguments, numbers_in, score_of


def make_args(**options) -> EvaluationArguments:
    return EvaluationArguments(**{"model": "model", "tasks": ["gqa"], "layer": 2, **options})


def make_row(selection: str, visual_tokens: int | None, task: str, score=None, tokens: float = 64.0, **fields) -> dict:
    row = {**make_args().settings, "selection": selection, "visual_tokens": visual_tokens, "task": task, **fields}
    if score is not None:
        row["results"] = {task: {"exact_match,none": score, "exact_match_stderr,none": 0.01}}
        row |= {"higher_is_better": {task: {"exact_match": True}}, "visual_tokens_per_image": tokens}
    return row


def test_the_default_layer_is_a_third_of_the_way_or_that_of_the_guide(tmp_path):
    vlm = BY_NAME["qwen2_5_vl"]
    vlm.make().config.save_pretrained(tmp_path / "model")
    assert default_layer(tmp_path / "model") == 1 == round(vlm.num_layers / 3)
    TextGuide(32, 4, 8, layer=7).save_pretrained(tmp_path / "guide")
    assert default_layer("model", str(tmp_path / "guide")) == 7


def test_tower_selection_keeps_what_is_asked_for():
    arguments = model_arguments("tower_image", 192, 192 / 576, make_args())
    (selection,) = SelectionSchedule.parse(arguments.pop("schedule")).by_layer.items()
    assert selection[0] == 2 and selection[1].guidance == "image" and selection[1].keep_rate == 192 / 576
    assert not arguments
    arguments = model_arguments("tower_text", 192, 0.5, make_args(guide="guide"))
    assert arguments == {"schedule": "2:text:0.5", "guide": "guide"}


def test_selections_and_numbers_are_checked():
    assert "tower_text" in make_args(guide="guide").selections and "tower_text" not in make_args().selections
    numbers = ({"visual_tokens": [0]}, {"limit": 0}, {"limit": -1}, {"batch_size": 0})
    for wrong in ({"selections": ["tower_text"]}, {"selections": ["exit"]}, *numbers):
        with pytest.raises(ValueError):
            make_args(**wrong)


def test_score_of_a_task_and_of_a_group():
    row = make_row("unpruned", None, "gqa", 0.5)
    assert score_of(row) == (0.5, 0.01)
    assert score_of({**row, "higher_is_better": {"gqa": {"exact_match": False}}}) == (None, None)
    group = {**make_row("unpruned", None, "a", 0.5), "task": "gqa"}
    group["results"] |= {"gqa": {}, "b": {"f1,none": 0.9}}
    group["higher_is_better"]["b"] = {"f1": True}
    assert score_of(group) == (pytest.approx(0.7), None)


def test_numbers_that_json_has_not_are_missing():
    found = numbers_in(
        {"exact_match,none": math.nan, "exact_match_stderr,none": math.inf, "f1,none": 0.5, "alias": "a"}
    )
    assert json.loads(json.dumps(found, allow_nan=False))["f1,none"] == 0.5
    assert score_of({**make_row("unpruned", None, "gqa", 0.5), "results": {"gqa": found}}) == (None, None)


def test_table_is_relative_to_the_unpruned_model(capsys):
    rows = [
        *(make_row("unpruned", None, "gqa", 0.5), make_row("unpruned", None, "pope", 0.8)),
        *(make_row("exit_prompt", 16, "gqa", 0.4, 16.0), make_row("exit_prompt", 16, "pope", 0.8, 14.0)),
        make_row("tower_image", 16, "gqa", 0.6, 16.0),
        make_row("fewer_pixels", 16, "gqa", not_supported="Tiles."),
    ]
    evaluate_vlm.print_table(rows, ["gqa", "pope"])
    _, _, *lines = capsys.readouterr().out.splitlines()
    unpruned, prompt, image, *_ = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert unpruned[1:] == ["all", "64.0", "100.0 ± 2.0 (0.5)", "100.0 ± 1.2 (0.8)", "100.0"]
    assert prompt[1:] == ["16", "15.0", "80.0 ± 2.0", "100.0 ± 1.2", "90.0"]
    assert image[1:] == ["16", "16.0", "120.0 ± 2.0", "-", "-"]
    assert "Tiles." in lines[-1]


def test_rows_of_a_file_are_not_evaluated_again(tmp_path, monkeypatch):
    args = make_args(visual_tokens=[64, 16], selections=["tower_image"], output_json=str(tmp_path / "rows.json"))
    rows = [make_row("unpruned", None, "gqa", 0.5), make_row("tower_image", 16, "gqa", 0.4, 16.0)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr(evaluate_vlm, "evaluate", None)  # it would be called for another row
    assert list(evaluate_vlm.make_rows(args)) == rows  # 64 tokens are all that the unpruned model has
    args.limit = 5
    with pytest.raises(ValueError, match="limit"):
        list(evaluate_vlm.make_rows(args))
