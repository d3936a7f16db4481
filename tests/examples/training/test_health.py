"""Is the selection healthy? Models that are made sick on purpose are found out, healthy ones are left in peace."""

import importlib
import itertools
import json

import pytest
import torch
from datasets import Dataset
from toy_tasks import OPTIONS, SCRIPTS, write_task

from modeling_trips import TripsForQuestionAnswering, TripsProcessor, modeling_trips_vision
from trips_examples import run_vqa
from trips_examples.ask import CHECKPOINT
from trips_examples.data.scenes import easy_vqa_records
from trips_examples.data.task_collators import VqaCollator
from trips_examples.training.health import LayerHealth, SelectionHealth, costs_time, macs_ratio
from trips_examples.training.options import TripsTrainingArguments
from trips_examples.training.trainer import ImageGroupedTrainer


@pytest.fixture(scope="module")
def questions() -> Dataset:
    """192 questions about 20 test pictures, with the box of the shape."""
    rows = []
    for number, row in enumerate(itertools.islice(easy_vqa_records("test"), 192)):
        image = {"path": str(row["image"]), "bytes": None}
        rows.append({**row, "image": image, "answers": [row["answer"]], "source": f"row {number}"})
    return Dataset.from_list(rows)


def health_of(model, dataset, tmp_path, texts_per_image=1) -> SelectionHealth:
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
    (health,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, SelectionHealth))
    return health


def shipped(**fields) -> TripsForQuestionAnswering:
    fields = {"attn_implementation": "eager", **fields}
    return TripsForQuestionAnswering.from_pretrained(CHECKPOINT, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"selection_guidance": ["image", "text"]},
        {"selection_mode": "mass", "selection_mass": 0.95, "min_keep_rate": 0.2},
    ],
    ids=["as shipped", "the image first", "by mass"],
)
def test_it_is_quiet_on_healthy_models(fields, questions, tmp_path, caplog):
    health = health_of(shipped(**fields), questions, tmp_path)
    health.examine()
    assert health.told == set() and caplog.text == ""
    (log,) = health.trainer.state.log_history
    assert 0.05 < log["selection_layer3_entropy"] < 0.5 and log["selection_layer3_mass"] > 0.5
    assert log["selection_layer3_inside_z"] > 10 and log["selection_time_ratio"] < 1
    assert log["selection_layer3_image_sensitivity"] > 0.1


def test_patches_that_are_the_same_in_every_image(questions, tmp_path, caplog):
    model = shipped()
    with torch.no_grad():  # no key differs from another: of equal scores the first patches win
        for layer in model.model.vision_model.layers:
            layer.attention.k_proj.weight.zero_()
            layer.attention.k_proj.bias.zero_()
    health = health_of(model, questions, tmp_path)
    health.examine()
    assert ("same places", 2) in health.told
    assert "Layer 2, guided by the text, keeps the same patches of every image (overlap 100.0%)" in caplog.text


def test_patches_that_are_the_same_whatever_the_text_and_it_is_said_once(questions, tmp_path, caplog):
    model = shipped()
    with torch.no_grad():  # [CLS] of every text becomes the bias
        model.model.text_model.encoder.layer[-1].output.LayerNorm.weight.zero_()
    health = health_of(model, questions.remove_columns("region"), tmp_path)
    health.examine()
    health.examine()
    assert health.told == {("deaf", 2), ("deaf", 3)}
    assert caplog.text.count("keeps the same patches whatever the text says") == 2  # in each layer
    assert "overlap among the texts of an image 100.0%" in caplog.text and "--selection_guidance image" in caplog.text

    of_one_thing = health_of(model, questions, tmp_path)  # all questions are about the one shape
    of_one_thing.examine()
    assert of_one_thing.told == set()


@pytest.mark.parametrize("regions", [True, False])
def test_random_choice_under_the_name_of_text(regions, questions, tmp_path, caplog, monkeypatch):
    def random_scores(query, key, scaling, candidate_mask=None):
        return torch.rand(len(key), key.shape[2]).softmax(dim=-1)

    monkeypatch.setattr(modeling_trips_vision, "score_tokens", random_scores)
    health = health_of(shipped(), questions if regions else questions.remove_columns("region"), tmp_path)
    health.examine()
    assert ("random", 3) in health.told
    words = "chooses no better than chance" if regions else "chooses as if at random"
    assert f"Layer 3, guided by the text, {words}" in caplog.text

    caplog.clear()
    honest = health_of(shipped(selection_guidance="random"), questions, tmp_path)
    honest.examine()
    assert honest.told == set()


def test_pruning_that_costs_time(questions, tmp_path, caplog):
    """Ten questions about an image, each with a pass of its own from layer 2 on."""
    model = shipped()
    before = model.config.keep_rate
    health = health_of(model, questions, tmp_path, texts_per_image=10)
    health.examine()
    assert health.told == {("time", None)} and "plan_selection.py" in caplog.text
    (log,) = health.trainer.state.log_history
    assert log["selection_time_ratio"] > 1.1 and log["selection_macs_ratio"] > 1.2
    assert model.config.keep_rate == before


def test_fine_detail_that_suffers(questions, tmp_path, caplog):
    """Of six patches drawn at random, few show the smallest shapes; the same weights unpruned do."""
    model = shipped(selection_guidance="random", keep_rate=[0.1, 0.5]).train()
    health = health_of(model, questions, tmp_path)
    health.examine(is_late=False)
    assert health.told == set()
    health.examine()
    assert health.told == {("fine detail", None)} and "Fine detail suffers: of " in caplog.text
    log = health.trainer.state.log_history[-1]
    assert log["selection_small_accuracy"] < 0.8 < log["selection_small_accuracy_unpruned"]
    assert model.config.keep_rate == [0.1, 0.5] and model.training and model.decoder.training


def test_a_time_that_is_not_in_the_work_is_told_apart():
    (finding,) = costs_time(1.3, 0.8, 1.0)
    assert "takes 1.30 times as long" in finding.words and "--keep_rate 1.0 is faster here" in finding.words
    assert [*costs_time(1.05, 0.8, 1.0)] == []


def test_all_scores_on_one_patch():
    metrics = {"entropy": 0.01, "kept": 4.0, "image_sensitivity": 0.5, "text_sensitivity": 0.3}
    (finding,) = LayerHealth(2, "image", metrics, 64, texts_differ=True).findings()
    assert finding.kind == "one patch" and "entropy 0.010" in finding.words


def test_the_ratio_of_work_is_that_of_the_closed_formula():
    """Layers that no text guides are shared: with more texts per image, pruning by the text saves less."""
    config = shipped().config
    assert macs_ratio(config, 10, 1) < 1 < macs_ratio(config, 10, 10)


@pytest.mark.parametrize("task", [*SCRIPTS, "retrieval", "pretraining"])
def test_each_script_logs_it_while_it_trains(task, tmp_path):
    """At every second step and at the last; an unpruned model has nothing to log."""
    data = write_task(task if task in SCRIPTS else "captions", tmp_path)
    options = [*data, *OPTIONS, "--max_steps=3", "--health_steps=2", "--do_eval=False", "--selection_layers=2"]
    script = importlib.import_module(f"trips_examples.{SCRIPTS.get(task, f'run_{task}')}")
    for rate in (0.5, 1.0):
        script.main([*options, f"--keep_rate={rate}", f"--output_dir={tmp_path / str(rate)}"])
        history = json.loads((tmp_path / str(rate) / "trainer_state.json").read_text())["log_history"]
        steps = [entry["step"] for entry in history if "selection_layer2_entropy" in entry]
        assert steps == ([2, 3] if rate < 1 else [])
        assert sum("selection_time_ratio" in entry for entry in history) == (rate < 1)


def test_never_is_never(tmp_path):
    options = [*write_task("vqa", tmp_path), *OPTIONS, "--max_steps=1", "--do_eval=False", "--health_steps=0"]
    run_vqa.main([*options, f"--output_dir={tmp_path / 'run'}"])
    assert "selection_" not in (tmp_path / "run" / "trainer_state.json").read_text()
    with pytest.raises(ValueError, match="--health_steps -1.0: must be at least 0"):
        TripsTrainingArguments(output_dir=str(tmp_path), health_steps=-1.0)
