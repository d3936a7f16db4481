"""Single-stream checkpoints: ViLT's weights, saving and loading."""

import pytest
import torch
from random_models import make_random
from tiny_hosts import INPUT_IDS, PAIRS, make_vilt
from torch.testing import assert_close
from transformers import ViltForQuestionAnswering, ViltModel

from modeling_trips import (
    UNPRUNED,
    TripsForImagesAndTextClassification,
    TripsForQuestionAnswering,
    TripsForVisualGrounding,
    TripsModel,
)
from modeling_trips.conversion.rules import load_converted
from modeling_trips.conversion.vilt import vilt_plan
from modeling_trips.hosts.apply import apply_patch_selection, record_patch_selection


def from_vilt(vilt, model_class=TripsModel, **selection):
    plan = vilt_plan(vilt.state_dict(), vilt.config, model_class, **selection)
    model = model_class(plan.config)
    return model.eval(), load_converted(model, vilt.state_dict(), plan)


@pytest.mark.parametrize("schedule", ["2:text:0.5,3:text:0.5", "2:image:0.5,3:image:0.5", "2:image:0.5,3:text:0.5"])
@torch.no_grad()
def test_with_selection_it_is_vilt_with_patch_selection(schedule):
    vilt = make_random(make_vilt(ViltModel))
    model, _ = from_vilt(vilt, schedule=schedule)
    output = model(**PAIRS)
    apply_patch_selection(vilt, model.config.vision_config.schedule)
    with record_patch_selection(vilt) as selections:
        expected = vilt(**PAIRS).last_hidden_state
    for entry, expected_entry in zip(output.selection, selections, strict=True):
        assert torch.equal(entry.kept_indices, expected_entry.kept_indices)
        assert torch.equal(entry.candidate_indices, expected_entry.candidate_indices)
        assert_close(entry.scores, expected_entry.scores, rtol=0, atol=1e-5)
    states = torch.cat((output.last_hidden_state, output.vision_model_output.last_hidden_state), dim=1)
    assert_close(states, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "model_class", [TripsForQuestionAnswering, TripsForImagesAndTextClassification, TripsForVisualGrounding]
)
def test_vilt_with_a_head_starts_any_head(model_class):
    vilt = make_random(make_vilt(ViltForQuestionAnswering, num_labels=3))
    decoder = {"num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2}
    model, report = from_vilt(vilt, model_class, schedule="2", decoder_config=decoder)
    assert {name.partition(".")[0] for name in report.left_out} == {"vilt", "classifier"}  # of ViLT itself: the pooler
    assert {name.partition(".")[0] for name in report.new} <= {"decoder", "lm_head", "classifier", "box_head"}
    expected = vilt.vilt(**PAIRS).last_hidden_state[:, : INPUT_IDS.shape[1]]  # the order of patches does not matter
    states = model.model(**PAIRS, schedule=UNPRUNED).last_hidden_state
    assert_close(states, expected, rtol=0, atol=1e-5)
