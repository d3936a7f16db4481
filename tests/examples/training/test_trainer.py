"""Values that are not finite, relevance, and parameters that data parallelism freezes."""

import json

import pytest
import torch
from loading import read, write
from safetensors.torch import load_file
from tiny_models import each_model, loss_of
from toy_tasks import OPTIONS, write_task

from modeling_trips import TripsForQuestionAnswering, TripsProcessor
from trips_examples import run_vqa
from trips_examples.training import start


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(tmp_path, monkeypatch):
    """The losses are finite: only the last gradient is not."""
    steps = []
    make_model = start.make_model

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        steps.append(len(steps) + 1)
        return gradient if steps == [1] else gradient * torch.inf

    def poisoned(*args, **kwargs):
        model = make_model(*args, **kwargs)
        model.lm_head.decoder.bias.register_hook(poison)
        return model

    monkeypatch.setattr(start, "make_model", poisoned)
    options = [*write_task("vqa", tmp_path), *OPTIONS, "--max_steps=2", f"--output_dir={tmp_path / 'run'}"]
    with pytest.raises(FloatingPointError, match="step 2"):
        run_vqa.main(options)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_an_evaluation_that_is_not_finite_stops(checkpoints, tmp_path):
    model = TripsForQuestionAnswering.from_pretrained(checkpoints["TripsForQuestionAnswering"])
    with torch.no_grad():
        next(model.lm_head.parameters()).fill_(float("nan"))
    model.save_pretrained(tmp_path / "start")
    TripsProcessor.from_pretrained(checkpoints["TripsForQuestionAnswering"]).save_pretrained(tmp_path / "start")
    options = [*write_task("vqa", tmp_path), "--do_train=False", f"--model={tmp_path / 'start'}"]
    with pytest.raises(FloatingPointError, match="eval_loss"):
        run_vqa.main([*options, f"--output_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "eval_results.json").exists()


def test_a_frozen_layer_that_a_text_scores_is_trained_while_its_scores_learn(tmp_path):
    """
    From step 3 of 8 on, the last but one that is unpruned, layer 2 learns relevance. A run that resumes before it ends
    as an uninterrupted one.
    """
    shares = ["--unpruned_share=0.5", "--relevance_share=0.5", "--max_steps=8"]
    shares += ["--schedule=2:text:0.5", "--logging_steps=1"]
    options = [*write_task("vqa", tmp_path), *OPTIONS, *shares, "--freeze_vision_layers=2", "--save_total_limit=9"]
    options += ["--do_eval=False", "--do_predict=False", "--save_strategy=steps", "--save_steps=1"]
    options += [f"--output_dir={tmp_path / 'run'}"]
    run_vqa.main(options)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "relevance_loss" in entry] == [3, 4, 5, 6, 7, 8]

    def layer_after(step: int, number: int) -> torch.Tensor:
        weights = load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        return weights[f"model.vision_model.layers.{number - 1}.attention.k_proj.weight"]

    assert torch.equal(layer_after(1, number=1), layer_after(8, number=1))
    assert torch.equal(layer_after(1, number=2), layer_after(2, number=2))
    assert not torch.equal(layer_after(2, number=2), layer_after(3, number=2))
    uninterrupted = load_file(tmp_path / "run" / "model.safetensors")
    run_vqa.main([*options, f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-1'}"])
    weights = load_file(tmp_path / "run" / "model.safetensors")
    torch.testing.assert_close(weights, uninterrupted, rtol=0, atol=0)


def test_a_resumed_run_takes_the_learning_rate_of_its_command(tmp_path):
    options = [*write_task("vqa", tmp_path), *OPTIONS, "--max_steps=4", "--logging_steps=1"]
    options += ["--save_strategy=steps", "--save_steps=2", "--lr_scheduler_type=linear"]
    options += ["--do_eval=False", f"--output_dir={tmp_path / 'run'}"]

    def rates(*more):
        run_vqa.main([*options, *more])
        history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
        return {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}

    usual = rates("--learning_rate=1e-3", "--tower_learning_rate=0")
    lower = rates(
        "--learning_rate=1e-4",
        "--tower_learning_rate=0",
        f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-2'}",
    )
    assert lower == pytest.approx({1: usual[1], 2: usual[2], 3: usual[3] / 10, 4: usual[4] / 10})


def test_logged_losses_do_not_depend_on_accumulation(tmp_path):
    """Of four rows with a region each, in one batch or in four."""
    files = write_task("vqa", tmp_path)
    rows = read(tmp_path / "rows.jsonl")[:4]
    write(tmp_path / "rows.jsonl", [{**row, "region": [8, 8, 24, 24]} for row in rows])
    losses = []
    for batch, parts in ((4, 1), (1, 4)):
        options = [f"--per_device_train_batch_size={batch}", f"--gradient_accumulation_steps={parts}"]
        options += ["--max_steps=1", "--logging_steps=1"]
        options += ["--do_eval=False", f"--output_dir={tmp_path / str(parts)}"]
        run_vqa.main([*files, *OPTIONS, *options])
        history = json.loads((tmp_path / str(parts) / "trainer_state.json").read_text())["log_history"]
        losses += [entry["selection_loss"] for entry in history if "selection_loss" in entry]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)  # dropout differs


def test_a_run_may_be_too_short_for_relevance(tmp_path):
    shares = ["--unpruned_share=0.5", "--relevance_share=0.25", "--max_steps=2"]
    options = [*write_task("vqa", tmp_path), *OPTIONS, *shares, "--schedule=2:text:0.5", "--freeze_vision_layers=2"]
    run_vqa.main([*options, "--do_eval=False", "--do_predict=False", f"--output_dir={tmp_path / 'run'}"])
    assert (tmp_path / "run" / "model.safetensors").exists()


@each_model
def test_every_parameter_has_a_gradient(case):
    """Otherwise data parallel training would have to look for those without."""
    model = case.make_model().train()
    loss_of(model(**case.make_inputs(training=True))).backward()
    missing = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert missing == []
