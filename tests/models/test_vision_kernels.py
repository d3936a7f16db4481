"""The vision tower without selection equals ViT; captured outputs, the convolutional stem and random guidance."""

import math

import pytest
import torch
from tiny_vision import images, make_model, texts
from transformers import ViTConfig, ViTModel


VIT_FIELDS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    "selection", [{"selection_layers": [1, 3], "keep_rate": 1.0}, {"selection_layers": []}], ids=str
)
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_without_selection_it_is_vit(selection, size):
    model = make_model(**VIT_FIELDS, image_size=16, patch_size=4, **selection)
    vit_config = ViTConfig(**VIT_FIELDS, image_size=16, patch_size=4, layer_norm_eps=1e-6)
    vit = ViTModel(vit_config, add_pooling_layer=False).eval()
    vit.load_state_dict(model.state_dict(), strict=True)
    pixel_values = images(3, size)
    expected = vit(pixel_values, interpolate_pos_encoding=True, output_hidden_states=True)
    output = model(pixel_values, texts(3, 32), output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(output.hidden_states[:-1], expected.hidden_states[:-1])
    assert output.selection == ()


def test_selection_adds_no_parameter_unless_the_widths_differ():
    plain = make_model(selection_layers=[]).state_dict().keys()
    assert make_model(selection_layers=[1, 2, 3], guidance_hidden_size=8).state_dict().keys() == plain
    projected = make_model(guidance_hidden_size=5).state_dict().keys()
    assert projected - plain == {"selection_projection.weight", "selection_projection.bias"}


BIG = {**VIT_FIELDS, "image_size": 32, "patch_size": 4, "selection_layers": [1, 3], "keep_rate": 0.6}  # 64 patches


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("first", [1, 2])
def test_captured_outputs_have_the_shrinking_shapes(attn_implementation, first):
    model = make_model(selection_layers=[first, 3], keep_rate=0.5, attn_implementation=attn_implementation)
    pixel_values = images()
    output = model(pixel_values, texts(), output_hidden_states=True, output_attentions=True)
    # 6 candidates -> 3 kept and 1 fused -> 2 kept and 1 fused. The MLP of a selection layer is on the short sequence.
    lengths = [7, 5, 5, 4] if first == 1 else [7, 7, 5, 4]
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, length, 8) for length in lengths]
    assert torch.equal(output.hidden_states[0], model.embeddings(pixel_values))
    torch.testing.assert_close(model.layernorm(output.hidden_states[-1]), output.last_hidden_state)
    if attn_implementation == "eager":  # attention comes before the selection: over the layer's input
        assert [tuple(weights.shape) for weights in output.attentions] == [(2, 2, n, n) for n in lengths[:-1]]
        for weights in output.attentions:
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_scores_are_the_attention_row_of_the_class_token_under_image_guidance():
    model = make_model(selection_guidance="image", attn_implementation="eager")
    output = model(images(), output_attentions=True)
    row = output.attentions[1][:, :, 0, 1:]  # with [CLS] left out, each head's row is renormalised
    torch.testing.assert_close(output.selection[0].scores, (row / row.sum(-1, keepdim=True)).mean(1))


def test_convolutional_stem_gives_the_same_grid():
    fields = {"patch_embedding_type": "convolutional", "image_size": [16, 24], "patch_size": 8}
    model = make_model(**fields)
    assert model.embeddings.patch_embeddings(images(2, (16, 24))).shape == (2, 6, 8)
    # Row-major: moving only the lower left corner of the image moves that patch (number 3) most.
    pixel_values = images(1, (16, 24))
    changed = pixel_values.clone()
    changed[..., 8:, :8] += 1.0
    difference = model.embeddings.patch_embeddings(changed) - model.embeddings.patch_embeddings(pixel_values)
    assert difference.norm(dim=-1).argmax() == 3


def test_random_guidance_keeps_the_same_in_evaluation_and_not_in_training():
    fields = {**BIG, "selection_guidance": "random"}
    model = make_model(**fields)
    kept = model(images(4, (32, 32)), texts(4, 32)).selection[0].kept_indices
    assert (kept == kept[0]).all()
    assert kept.shape == (4, math.ceil(0.6 * 64))
    kept = model.train()(images(4, (32, 32)), texts(4, 32)).selection[0].kept_indices
    assert not (kept == kept[0]).all()
