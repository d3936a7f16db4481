"""The model without a head: data flow, the gradient of the text encoder, and one checkpoint for every selection."""

import pytest
import torch
from tiny_models import Case, kept_by

from modeling_trips import UNPRUNED, TripsModel, use_schedule


CASE = Case(TripsModel)


def test_it_is_its_three_parts_in_order():
    model, inputs = CASE.make_model(), CASE.make_inputs()
    output = model(**inputs)
    text = model.text_model(inputs["input_ids"], inputs["attention_mask"])
    vision = model.vision_model(inputs["pixel_values"], text.last_hidden_state[:, 0])
    fused = model.fusion_model(text.last_hidden_state, vision.last_hidden_state, inputs["attention_mask"])
    torch.testing.assert_close(output.last_hidden_state, fused.last_hidden_state)
    torch.testing.assert_close(output.text_model_output.last_hidden_state, text.last_hidden_state)
    torch.testing.assert_close(output.vision_model_output.last_hidden_state, vision.last_hidden_state)
    assert output.last_hidden_state.shape == (4, 5, 48)
    # 64 patches -> 39 and 1 fused -> 24 and 1 fused
    assert vision.last_hidden_state.shape == (4, 1 + 24 + 1, 32)
    assert kept_by(output) == kept_by(vision)
    assert [entry.kept_indices.shape[1] for entry in output.selection] == [39, 24]


@pytest.mark.parametrize("fuse", [True, False])
def test_text_encoder_is_trained_through_the_selection(fuse):
    model = CASE.make_model(fuse_inattentive_tokens=fuse)
    model(**CASE.make_inputs()).vision_model_output.last_hidden_state.sin().sum().backward()
    gradient = model.text_model.encoder.layer[0].attention.self.query.weight.grad
    assert (gradient is not None and gradient.norm() > 1e-4) == fuse


def test_a_checkpoint_is_the_same_for_every_selection(tmp_path):
    model, inputs = CASE.make_model(), CASE.make_inputs()
    model.save_pretrained(tmp_path)
    unpruned, report = TripsModel.from_pretrained(tmp_path, selection_layers=[], output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert unpruned(**inputs).vision_model_output.last_hidden_state.shape[1] == 65
    with use_schedule(model, UNPRUNED):
        states = model(**inputs).last_hidden_state
    torch.testing.assert_close(unpruned(**inputs).last_hidden_state, states)
