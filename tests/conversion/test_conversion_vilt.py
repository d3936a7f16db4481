"""Single-stream checkpoints: ViLT's weights, saving and loading."""

import pytest
import torch
from tiny_retrieval import images
from tiny_single_stream import HEADS, IDS, MASK, randomize
from transformers import ViltConfig, ViltForQuestionAnswering, ViltModel

from modeling_trips import UNPRUNED, TripsModel
from modeling_trips.conversion.rules import load_converted
from modeling_trips.conversion.vilt import vilt_plan
from modeling_trips.hosts.apply import apply_patch_selection, record_patch_selection


def make_vilt(model_class=ViltModel, **fields):
    config = ViltConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=4,
        max_position_embeddings=12,
        layer_norm_eps=1e-5,
        **fields,
    )
    return randomize(model_class(config))


def from_vilt(vilt, model_class=TripsModel, **selection):
    plan = vilt_plan(vilt.state_dict(), vilt.config, model_class, **selection)
    model = model_class(plan.config)
    return model.eval(), load_converted(model, vilt.state_dict(), plan)


def run_vilt(vilt):
    """Return ViLT's states of text and image, with patches in grid order, because ViLT shuffles them."""
    torch.manual_seed(0)
    states = vilt(IDS, MASK, pixel_values=images(4)).last_hidden_state
    torch.manual_seed(0)
    _, _, (places, _) = vilt.embeddings.visual_embed(images(4), torch.ones(4, 16, 16), max_image_length=-1)
    rows, columns = places.unbind(dim=-1)
    order = (rows * 4 + columns).argsort(dim=1)
    text = states[:, :5]
    class_token = states[:, 5:6]
    patches = states[:, 6:].gather(1, order.unsqueeze(-1).expand(-1, -1, 16))
    return text, torch.cat((class_token, patches), dim=1)


@torch.no_grad()
def test_without_selection_it_is_vilt():
    vilt = make_vilt()
    text, image = run_vilt(vilt)
    model, report = from_vilt(vilt, schedule="unpruned")
    assert report.new == []
    assert report.left_out.keys() == {"pooler.dense.weight", "pooler.dense.bias"}
    output = model(IDS, images(4), MASK)
    torch.testing.assert_close(output.last_hidden_state, text, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.vision_model_output.last_hidden_state, image, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.vision_model_output.pooler_output, image[:, 0], rtol=0, atol=1e-5)
    assert output.selection == ()


@pytest.mark.parametrize("guidance", ["text", "image"])
@torch.no_grad()
def test_with_selection_it_is_vilt_with_patch_selection(guidance):
    vilt = make_vilt()
    model, _ = from_vilt(vilt, schedule=f"2:{guidance}:0.5,3:{guidance}:0.5")
    output = model(IDS, images(4), MASK)
    apply_patch_selection(vilt, model.config.vision_config.schedule)
    with record_patch_selection(vilt) as selections:
        expected = vilt(IDS, MASK, pixel_values=images(4)).last_hidden_state
    for entry, expected_entry in zip(output.selection, selections, strict=True):
        assert torch.equal(entry.kept_indices, expected_entry.kept_indices)
        assert torch.equal(entry.candidate_indices, expected_entry.candidate_indices)
        torch.testing.assert_close(entry.scores, expected_entry.scores, rtol=0, atol=1e-5)
    states = torch.cat((output.last_hidden_state, output.vision_model_output.last_hidden_state), dim=1)
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_class", HEADS)
def test_vilt_with_a_head_starts_any_head(model_class):
    vilt = make_vilt(ViltForQuestionAnswering, num_labels=3)
    decoder = {"num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2}
    model, report = from_vilt(vilt, model_class, schedule="2", decoder_config=decoder)
    assert {name.partition(".")[0] for name in report.left_out} == {"vilt", "classifier"}  # of ViLT itself: the pooler
    assert {name.partition(".")[0] for name in report.new} <= {"decoder", "lm_head", "classifier", "box_head"}
    expected, _ = run_vilt(vilt.vilt)
    states = model.model(IDS, images(4), MASK, schedule=UNPRUNED).last_hidden_state
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
