"""Monitoring of training: stopping at a loss that is not finite, and warnings about the selection."""

import importlib
import itertools
import json

import PIL.Image
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from toy_tasks import OPTIONS, SCRIPTS, write_task

from modeling_trips import TripsForQuestionAnswering, TripsProcessor, modeling_trips_vision
from trips_examples import run_grounding, run_vqa
from trips_examples.analysis.comparison import Group
from trips_examples.ask import CHECKPOINT
from trips_examples.data.scenes import scene_records
from trips_examples.data.task_collators import VqaCollator
from trips_examples.training.callbacks import (
    TrainingMonitor,
    detail_findings,
    last_good_checkpoint,
    layer_findings,
    small_things,
)
from trips_examples.training.options import TripsTrainingArguments
from trips_examples.training.trainer import ImageGroupedTrainer


@pytest.fixture(scope="module")
def questions() -> Dataset:
    """Return 192 questions about test scenes, each with the quarter that it is about."""
    rows = enumerate(itertools.islice(scene_records("vqa", "test", 40), 192))
    return Dataset.from_list([{**row, "answers": [row["answer"]], "source": f"row {number}"} for number, row in rows])


def health_of(model, dataset, tmp_path, texts_per_image=1) -> TrainingMonitor:
    processor = TripsProcessor.from_pretrained(CHECKPOINT)
    args = TripsTrainingArguments(
        output_dir=str(tmp_path),
        texts_per_image=texts_per_image,
        per_device_train_batch_size=20,
        auto_bf16=False,
        report_to="none",
    )
    collator = VqaCollator(processor)
    trainer = ImageGroupedTrainer(
        model=model,
        args=args,
        eval_dataset=dataset,
        data_collator=collator,
        train_collator=collator,
        processing_class=processor,
    )
    return trainer.monitor


def shipped(**fields) -> TripsForQuestionAnswering:
    fields = {"attn_implementation": "eager", **fields}
    return TripsForQuestionAnswering.from_pretrained(CHECKPOINT, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"selection_layers": [1, 2], "keep_rate": [0.9, 0.25], "selection_guidance": ["image", "text"]},
    ],
    ids=["as shipped", "the image first"],
)
def test_healthy_models_have_no_findings(fields, questions, tmp_path, caplog):
    health = health_of(shipped(**fields), questions, tmp_path)
    health.examine()
    assert health.reported == set() and caplog.text == ""
    (log,) = health.trainer.state.log_history
    assert 0.6 < log["selection_layer2_entropy"] < 0.8 and log["selection_layer2_mass"] > 0.5
    assert log["selection_layer2_patch_precision_z"] > 10 and log["selection_time_ratio"] < 1
    assert log["selection_layer2_image_sensitivity"] > 0.1


def test_same_patches_in_every_image_are_reported(questions, tmp_path, caplog):
    model = shipped()
    with torch.no_grad():  # all keys are equal, so that the first patches win
        for layer in model.model.vision_model.layers:
            layer.attention.k_proj.weight.zero_()
            layer.attention.k_proj.bias.zero_()
    health = health_of(model, questions, tmp_path)
    health.examine()
    assert ("same places", 2) in health.reported


def test_same_patches_for_every_text_are_reported_once(questions, tmp_path, caplog):
    model = shipped()
    with torch.no_grad():  # [CLS] of every text is the bias
        model.model.text_model.encoder.layer[-1].output.LayerNorm.weight.zero_()
    without_regions = questions.remove_columns("region")
    health = health_of(model, without_regions, tmp_path)
    health.examine()
    health.examine()
    assert health.reported == {("text ignored", 2)}
    assert len(caplog.records) == 1 and "100.0%" in caplog.records[0].message

    whole = [[0, 0, 128, 128]] * len(questions)
    of_one_thing = health_of(model, without_regions.add_column("region", whole), tmp_path)
    of_one_thing.examine()
    assert of_one_thing.reported == set()


@pytest.mark.parametrize("regions", [True, False])
def test_random_text_guidance_is_reported(regions, questions, tmp_path, caplog, monkeypatch):
    def random_scores(query, key, scaling):
        return torch.rand(len(key), key.shape[2]).softmax(dim=-1)

    monkeypatch.setattr(modeling_trips_vision, "score_tokens", random_scores)
    health = health_of(shipped(), questions if regions else questions.remove_columns("region"), tmp_path)
    health.examine()
    assert ("random", 2) in health.reported
    honest = health_of(shipped(selection_guidance="random"), questions, tmp_path)
    honest.examine()
    assert honest.reported == set()


def test_pruning_that_costs_time(questions, tmp_path, caplog):
    """Each of five questions about an image needs its own pass from layer 2 on."""
    model = shipped(keep_rate=0.5)
    before = model.config.keep_rate
    health = health_of(model, questions, tmp_path, texts_per_image=10)
    health.examine()
    assert health.reported == {("time", None)}
    (log,) = health.trainer.state.log_history
    assert log["selection_time_ratio"] > 1.1 and log["selection_macs_ratio"] > 1.2
    assert model.config.keep_rate == before


def test_fine_detail_that_suffers(questions, tmp_path, caplog):
    """Seven random patches rarely show a shape, but all patches do."""
    x0, y0, x1, y1 = zip(*([0, 0, 128, 128] if box is None else box for box in questions["region"]))
    middles = [[a + 16, b + 16, c - 16, d - 16] for a, b, c, d in zip(x0, y0, x1, y1)]  # a sixteenth of the image
    small = questions.remove_columns("region").add_column("region", middles)
    model = shipped(selection_guidance="random", keep_rate=0.1).train()
    health = health_of(model, small, tmp_path)
    health.examine(is_late=False)
    assert health.reported == set()
    health.examine()
    assert health.reported == {("fine detail", None)}
    log = health.trainer.state.log_history[-1]
    assert log["selection_small_accuracy"] < 0.8 < log["selection_small_accuracy_unpruned"]
    assert model.config.keep_rate == 0.1 and model.training and model.decoder.training


def test_all_scores_on_one_patch_are_reported():
    metrics = {"entropy": 0.01, "kept": 4.0, "image_sensitivity": 0.5, "text_sensitivity": 0.3}
    (finding,) = layer_findings(2, "image", metrics, 64, texts_differ=True)
    assert finding.kind == "one patch" and "0.010" in finding.words


@pytest.mark.parametrize("task", [*SCRIPTS, "retrieval", "pretraining"])
def test_each_script_logs_it_while_it_trains(task, tmp_path):
    """It logs at every second step and at the last one. The unpruned baseline has no selection to log."""
    data = write_task(task if task in SCRIPTS else "captions", tmp_path)
    options = [*data, *OPTIONS, "--max_steps=3", "--health_steps=2", "--do_eval=False", "--selection_layers=2"]
    script = importlib.import_module(f"trips_examples.{SCRIPTS.get(task, f'run_{task}')}")
    for rate in (0.5, 1.0):
        script.main([*options, f"--keep_rate={rate}", f"--output_dir={tmp_path / str(rate)}"])
        history = json.loads((tmp_path / str(rate) / "trainer_state.json").read_text())["log_history"]
        steps = [entry["step"] for entry in history if "selection_layer2_entropy" in entry]
        assert steps == ([2, 3] if rate < 1 else [])
        assert sum("selection_time_ratio" in entry for entry in history) == (rate < 1)


def test_health_steps_zero_disables_checks(tmp_path):
    options = [*write_task("vqa", tmp_path), *OPTIONS, "--max_steps=1", "--do_eval=False", "--health_steps=0"]
    run_vqa.main([*options, f"--output_dir={tmp_path / 'run'}"])
    assert "selection_" not in (tmp_path / "run" / "trainer_state.json").read_text()
    with pytest.raises(ValueError, match="--health_steps"):
        TripsTrainingArguments(output_dir=str(tmp_path), health_steps=-1.0)


def test_small_things_cover_at_most_a_sixteenth():
    image = PIL.Image.new("RGB", (80, 40))
    boxes = [[0, 0, 20, 10], [0, 0, 20, 10.1], None, [70, 30, 80, 40]]
    rows = [{"image": image, "region": box} for box in boxes]
    assert small_things(rows) == [rows[0], rows[3]]
    assert small_things([{"image": image, "question": "what is it?"}]) == []


@pytest.mark.parametrize(("lost", "won", "p_value"), [(4, 20, 0.0015), (6, 4, 0.75), (0, 0, 1.0)])
def test_insignificant_differences_are_not_reported(lost, won, p_value):
    small = Group("all", "", 80, 0.5, 0.5 + (lost - won) / 80, lost, won, p_value, p_value)
    assert [*detail_findings(small)] == []


def test_small_boxes_are_compared_after_half_of_the_training(tmp_path):
    rows = []
    for number in range(4):
        image, box = PIL.Image.new("RGB", (64, 64), "gray"), [8 * number, 8, 8 * number + 8, 16]
        image.paste("red", box)
        image.save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "expression": "the red square", "box": box}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = [f"--{split}_file={tmp_path / 'rows.jsonl'}" for split in ("train", "validation")]
    steps = ["--max_steps=4", "--health_steps=1", "--do_eval=False", f"--output_dir={tmp_path / 'run'}"]
    run_grounding.main([*data, *OPTIONS, *steps, "--selection_layers=2", "--keep_rate=0.5"])
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "selection_small_accuracy" in entry]
    assert [entry["step"] for entry in logged] == [2, 3, 4]
    assert all(0 <= entry["selection_small_accuracy_unpruned"] <= 1 for entry in logged)


def save_weights(folder, value: float):
    folder.mkdir(parents=True)
    save_file({"fine": torch.ones(2), "weight": torch.tensor([1.0, value])}, folder / "model.safetensors")


def test_last_good_checkpoint(tmp_path):
    assert last_good_checkpoint(tmp_path, before=10) is None
    save_weights(tmp_path / "checkpoint-9", 1.0)
    save_weights(tmp_path / "checkpoint-10", float("nan"))
    save_weights(tmp_path / "checkpoint-12", 1.0)
    assert last_good_checkpoint(tmp_path, before=11) == tmp_path / "checkpoint-9"  # 10 as text is before 9
    assert last_good_checkpoint(tmp_path, before=12) == tmp_path / "checkpoint-9"
    assert last_good_checkpoint(tmp_path, before=13) == tmp_path / "checkpoint-12"
    assert last_good_checkpoint(tmp_path, before=9) is None


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_loss_raises(loss, tmp_path):
    monitor = health_of(shipped(), None, tmp_path)
    save_weights(tmp_path / "checkpoint-6", 1.0)
    monitor.watch_loss(torch.tensor(1e30), 6, ["a row 1"])
    with pytest.raises(FloatingPointError) as error:
        monitor.watch_loss(torch.tensor(loss), 7, ["a row 2", "b row 3"])
    assert f"step 7 is {loss} for the rows a row 2, b row 3." in str(error.value)
    assert f"--resume_from_checkpoint {tmp_path / 'checkpoint-6'}" in str(error.value)
    with pytest.raises(FloatingPointError) as error:
        health_of(shipped(), None, tmp_path / "empty").watch_loss(torch.tensor(loss), 1, [])
    assert "--resume_from_checkpoint" not in str(error.value)
