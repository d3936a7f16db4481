"""Monitoring of training: stopping at values that are not finite, and logging of the selection."""

import importlib
import json

import pytest
import torch
from datasets import Dataset
from toy_tasks import OPTIONS, SCRIPTS, write_task

from modeling_trips import TripsForQuestionAnswering, TripsProcessor
from trips_examples import run_vqa
from trips_examples.ask import CHECKPOINT
from trips_examples.data.busy_scenes import busy_records
from trips_examples.data.collators import VqaCollator
from trips_examples.training.callbacks import LOGGED, TrainingMonitor, Watched
from trips_examples.training.options import TripsTrainingArguments
from trips_examples.training.trainer import ImageGroupedTrainer


def monitor_of(model, dataset, tmp_path) -> TrainingMonitor:
    processor = TripsProcessor.from_pretrained(CHECKPOINT)
    args = TripsTrainingArguments(output_dir=str(tmp_path), auto_bf16=False, report_to="none")
    trainer = ImageGroupedTrainer(
        model=model,
        args=args,
        eval_dataset=dataset,
        data_collator=VqaCollator(processor),
        train_collator=VqaCollator(processor, training=True),
        processing_class=processor,
    )
    return trainer.monitor


@pytest.fixture
def shipped() -> TripsForQuestionAnswering:
    return TripsForQuestionAnswering.from_pretrained(CHECKPOINT, attn_implementation="eager")


def test_the_shipped_model_selects_by_text_and_image(shipped, tmp_path):
    records = enumerate(busy_records("vqa", "test", 12))
    rows = [{**row, "answers": [row["answer"]], "source": f"row {number}"} for number, row in records]
    metrics = monitor_of(shipped.train(), Dataset.from_list(rows), tmp_path).measure()
    assert metrics.keys() == {f"selection_{name}" for name in LOGGED} and len(metrics) <= 5
    assert 0.2 < metrics["selection_entropy"] < 0.8
    assert metrics["selection_text_sensitivity"] > 0.3 and metrics["selection_image_sensitivity"] > 0.1
    assert metrics["selection_patch_precision"] > 0.3
    assert shipped.training


@pytest.mark.parametrize("task", [*SCRIPTS, "retrieval", "pretraining"])
def test_each_script_logs_the_selection_while_it_trains(task, tmp_path):
    """It logs at every second step and at the last one. The unpruned baseline has no selection to log."""
    data = write_task(task if task in SCRIPTS else "captions", tmp_path)
    options = [*data, *OPTIONS, "--max_steps=3", "--health_steps=2", "--do_eval=False", "--selection_layers=2"]
    script = importlib.import_module(f"trips_examples.{SCRIPTS.get(task, f'run_{task}')}")
    for rate in (0.5, 1.0):
        script.main([*options, f"--keep_rate={rate}", f"--output_dir={tmp_path / str(rate)}"])
        history = json.loads((tmp_path / str(rate) / "trainer_state.json").read_text())["log_history"]
        steps = [entry["step"] for entry in history if "selection_entropy" in entry]
        assert steps == ([2, 3] if rate < 1 else [])


def test_health_steps_zero_disables_the_log(tmp_path):
    options = [*write_task("vqa", tmp_path), *OPTIONS, "--max_steps=1", "--do_eval=False", "--health_steps=0"]
    run_vqa.main([*options, f"--output_dir={tmp_path / 'run'}"])
    assert "selection_" not in (tmp_path / "run" / "trainer_state.json").read_text()
    with pytest.raises(ValueError, match="--health_steps"):
        TripsTrainingArguments(output_dir=str(tmp_path), health_steps=-1.0)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_and_names_step_and_rows(loss, shipped, tmp_path):
    monitor = monitor_of(shipped, None, tmp_path)
    monitor.watch("loss", torch.tensor(1e30), 6, ["a row 1"])
    with pytest.raises(FloatingPointError, match=f"step 7 is {loss} for the rows a row 2, b row 3"):
        monitor.watch("loss", torch.tensor(loss), 7, ["a row 2", "b row 3"])


def test_values_of_an_accelerator_are_checked_in_the_next_step(shipped, tmp_path):
    monitor = monitor_of(shipped, None, tmp_path)
    monitor.pending.append(Watched("loss", 6, ["a row 1"], torch.tensor([float("nan")]), None))
    monitor.check(before=6)
    with pytest.raises(FloatingPointError, match="loss of step 6"):
        monitor.check(before=7)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(shipped, tmp_path, monkeypatch):
    """The loss is finite: only the last step's gradient is not."""
    options = [*write_task("vqa", tmp_path), *OPTIONS, "--max_steps=2", f"--output_dir={tmp_path / 'run'}"]

    def poison(self, step, *args, **kwargs):
        if self.trainer.state.global_step == 1 and step == "loss":
            next(self.trainer.model.parameters()).grad.fill_(float("inf"))
        return watch(self, step, *args, **kwargs)

    watch = TrainingMonitor.watch
    monkeypatch.setattr(TrainingMonitor, "watch", poison)
    with pytest.raises(FloatingPointError, match="gradient norm of step 2"):
        run_vqa.main(options)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_an_evaluation_that_is_not_finite_stops(checkpoints, tmp_path):
    model = TripsForQuestionAnswering.from_pretrained(checkpoints["TripsForQuestionAnswering"])
    with torch.no_grad():
        next(model.lm_head.parameters()).fill_(float("nan"))
    model.save_pretrained(tmp_path / "start")
    TripsProcessor.from_pretrained(checkpoints["TripsForQuestionAnswering"]).save_pretrained(tmp_path / "start")
    options = [*write_task("vqa", tmp_path), "--do_train=False", f"--model_name_or_path={tmp_path / 'start'}"]
    with pytest.raises(FloatingPointError, match="eval_loss"):
        run_vqa.main([*options, f"--output_dir={tmp_path / 'run'}", "--auto_bf16=False"])
    assert not (tmp_path / "run" / "eval_results.json").exists()
