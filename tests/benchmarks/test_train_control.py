"""Controls of the selection: one query for all texts, and regions of few texts."""

import json
import subprocess
import sys

import pytest
import torch
import train_control
from tiny_models import CASES
from train_control import (
    draw_without_gate,
    end_without_gate,
    keep_regions,
    leave_no_fused_token,
    use_constant_query,
    use_few_regions,
)

from modeling_trips import TripsConfig, TripsForQuestionAnswering, TripsModel, TripsProcessor
from modeling_trips.modeling_trips_text import TripsTextModel
from modeling_trips.modeling_trips_vision import TripsVisionLayer
from modeling_trips.patch_selection import region_targets
from trips_examples import run_vqa
from trips_examples.ask import CHECKPOINT
from trips_examples.data.busy_scenes import busy_records
from trips_examples.data.collators import VqaCollator
from trips_examples.data.images import read_image
from trips_examples.training.options import ModelArguments
from trips_examples.training.trainer import ImageGroupedTrainer


CASE = CASES[0]


@pytest.fixture
def restored(monkeypatch):
    """Put back what a control replaces."""
    for owner, name in (
        (TripsTextModel, "pooled"),
        (VqaCollator, "regions"),
        (VqaCollator, "encode"),
        (TripsModel, "fuse"),
        (TripsVisionLayer, "score"),
        (TripsVisionLayer, "draws"),
        (ModelArguments, "config_overrides"),
        (ImageGroupedTrainer, "training_step"),
        (ImageGroupedTrainer, "regions_used_for"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


def inputs_about_one_image():
    inputs = CASE.make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"][:1].expand(4, -1, -1, -1)
    return inputs


def test_a_constant_query_keeps_the_same_patches_for_all_texts_and_learns(restored):
    model, inputs = CASE.make_model(selection_gate=0.5), inputs_about_one_image()
    kept = model(**inputs).selection[0].kept_indices
    assert not (kept == kept[0]).all()
    use_constant_query()
    kept = model(**inputs).selection[0].kept_indices
    assert (kept == kept[0]).all()
    outputs = model.train()(**inputs)
    outputs.selection[0].scores.square().sum().backward()
    assert model.text_model.encoder.layer[0].output.dense.weight.grad.any()


def test_a_tenth_of_the_training_texts_has_its_region_and_always_the_same(restored):
    rows = [row for row in busy_records("vqa", "train", 100) if row["region"] is not None]
    sizes = [read_image(row).size for row in rows]
    processor = TripsProcessor.from_pretrained(CHECKPOINT)
    use_few_regions(10)
    collators = [VqaCollator(processor, training=training) for training in (True, True, False)]
    first, again, evaluated = ([*map(bool, c.regions(rows, sizes)["regions"].any(dim=1))] for c in collators)
    assert first == again and all(evaluated)
    assert 0.05 * len(rows) < sum(first) < 0.15 * len(rows)


@pytest.mark.parametrize("training", [True, False])
def test_patches_of_the_region_alone_are_kept_and_without_a_region_those_of_the_model(restored, training):
    rows = [{**row, "answers": [row["answer"]], "source": ""} for row in busy_records("vqa", "test", 2)]
    processor = TripsProcessor.from_pretrained(CHECKPOINT)
    model = TripsForQuestionAnswering.from_pretrained(CHECKPOINT).train(training)
    inputs = VqaCollator(processor)(rows)
    inputs.pop("sources", None)
    torch.manual_seed(0)  # in training, patches are drawn
    own = model(**inputs).selection[-1].kept_indices
    keep_regions()
    inputs = VqaCollator(processor, training=training)(rows)
    inputs.pop("sources", None)
    torch.manual_seed(0)
    kept = model(**inputs).selection[-1].kept_indices
    shares = region_targets(inputs["regions"], (12, 12)).gather(1, kept)
    has_region = torch.tensor([row["region"] is not None for row in rows])
    assert has_region.any() and not has_region.all()
    assert (shares[has_region] > 0).all()
    assert torch.equal(kept[~has_region], own[~has_region])


def test_patches_are_drawn_without_a_gate_in_training_only(restored):
    model, inputs = CASE.make_model().train(), inputs_about_one_image()

    def kept() -> torch.Tensor:
        return model(**inputs).selection[-1].kept_indices

    best = kept()
    draw_without_gate()
    torch.manual_seed(0)
    assert not torch.equal(kept(), best)
    with torch.no_grad():
        assert torch.equal(kept(), best)


def test_a_run_drops_patches_without_a_token_and_ends_without_the_gate(restored, tmp_path, monkeypatch):
    gates, training_step = [], ImageGroupedTrainer.training_step

    def record(self, *args, **kwargs):
        gates.append(self.model.config.vision_config.selection_gate)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(ImageGroupedTrainer, "training_step", record)
    leave_no_fused_token()
    end_without_gate()
    data = "--dataset_name busy_scenes --train_scenes 8 --validation_scenes 2 --test_scenes 2 --do_eval False"
    options = (
        "--selection_gate 0.5 --max_steps 4 --per_device_train_batch_size 4 --save_strategy no --do_predict False"
    )
    start = f"--model {CHECKPOINT} --output_dir {tmp_path}"
    run_vqa.main(f"{data} {options} {start}".split())
    assert gates == [0.5, 0.5, 0.5, 0.0]
    assert not TripsConfig.from_pretrained(tmp_path).vision_config.fuse_inattentive_tokens


@pytest.mark.slow
def test_results_name_the_control(tmp_path):
    data = "--dataset_name busy_scenes --validation_scenes 2 --do_train False --do_predict False"
    options = [*data.split(), "--model", CHECKPOINT, "--output_dir", tmp_path]
    subprocess.run([sys.executable, train_control.__file__, "not_fused", *options], check=True)
    command = json.loads((tmp_path / "eval_results.json").read_text())["command"]
    assert command.startswith("benchmarks/train_control.py not_fused --dataset_name busy_scenes ")
