"""Controls of the selection: one query for all texts, and the regions themselves."""

import pytest
import torch
from tiny_models import CASES
from train_control import use_constant_query, use_regions

from modeling_trips import TripsModel
from modeling_trips.modeling_trips_text import TripsTextModel
from modeling_trips.modeling_trips_vision import TripsVisionLayer
from modeling_trips.patch_selection import region_targets
from trips_examples.data.collators import VqaCollator


CASE = CASES[0]


@pytest.fixture
def restored(monkeypatch):
    """Put back what a control replaces."""
    for owner, name in (
        *((TripsModel, "fuse"), (TripsTextModel, "pooled")),
        *((TripsVisionLayer, "score"), (VqaCollator, "encode")),
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


def test_the_oracle_keeps_the_region_of_each_text(restored):
    regions = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.75, 0.5, 0.25, 0.25], [0.5, 0.5, 0.5, 0.5], [0.0] * 4])
    model, inputs = CASE.make_model(selection_layers=[1], keep_rate=0.4), inputs_about_one_image()
    own = model(**inputs).selection[0].kept_indices[3]
    use_regions()
    kept = model(**inputs, regions=regions).selection[0].kept_indices
    targets = region_targets(regions, (8, 8))
    for row in range(3):
        assert set(targets[row].nonzero()[:, 0].tolist()) <= set(kept[row].tolist())
    assert torch.equal(kept[3], own)  # a text without a region
