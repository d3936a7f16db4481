"""The single stream against its definition, and errors of unsupported options."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from schedules import rates_of
from tiny_single_stream import IDS, INDEX, MASK, images, kept, make_config, make_model

from modeling_trips import (
    TripsConfig,
    TripsForPreTraining,
    TripsForRetrieval,
    TripsModel,
)


# ---------------------------------------------------------------------------------------------------------------------
# Against the definition


def naive_layer_norm(module, states):
    centered = states - states.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias


def naive_run(model, ids, image):
    """Run one text without padding and one image. Return the states of the text and the kept patches of each layer."""
    config, tower = model.config.vision_config, model.vision_model
    text = model.text_model(ids[None]).last_hidden_state[0]
    image = tower.embeddings(image[None])[0]
    types = tower.modality_embeddings.weight
    tokens = list(text + types[0]) + list(image + types[1])
    first, original, selections = len(text) + 1, list(range(len(image) - 1)), []
    width = config.hidden_size // config.num_attention_heads
    for number, layer in enumerate(tower.layers, start=1):
        attention, normed = layer.attention, naive_layer_norm(layer.layernorm_before, torch.stack(tokens))
        query, key, value = (getattr(attention, f"{part}_proj")(normed).split(width, dim=1) for part in "qkv")
        mixed = [(q @ k.T / math.sqrt(width)).softmax(dim=1) @ v for q, k, v in zip(query, key, value)]
        tokens = list(torch.stack(tokens) + attention.o_proj(torch.cat(mixed, dim=1)))
        if number in rates_of(config):
            guide = {"text": 0, "image": len(text)}[config.selection_guidance]
            heads = [(k[first:] @ q[guide] / math.sqrt(width)).softmax(dim=0) for q, k in zip(query, key)]
            scores = (sum(heads) / len(heads)).tolist()
            num_kept = math.ceil(rates_of(config)[number] * len(scores))
            kept = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:num_kept])
            fused = sum(scores[i] * tokens[first + i] for i in range(len(scores)) if i not in kept)
            selections.append([original[i] for i in kept])
            tokens, original = tokens[:first] + [tokens[first + i] for i in kept] + [fused], selections[-1] + [-1]
        states = torch.stack(tokens)
        tokens = list(states + layer.mlp(naive_layer_norm(layer.layernorm_after, states)))
    return naive_layer_norm(tower.layernorm, torch.stack(tokens))[: len(text)], selections


@pytest.mark.parametrize("guidance", ["text", "image"])
@torch.no_grad()
def test_selection_follows_the_formula_for_each_pair_alone(guidance):
    model = make_model(selection_guidance=guidance, selection_layers=[1, 3]).double()
    output = model(IDS, images(4).double(), MASK)
    for row in range(4):
        length = int(MASK[row].sum())
        states, selections = naive_run(model, IDS[row, :length], images(4)[row].double())
        torch.testing.assert_close(output.last_hidden_state[row, :length], states)
        assert [entry[row] for entry in kept(output)] == selections


@torch.no_grad()
def test_the_text_picks_the_patches():
    model, same_image = make_model(), {"pixel_values": images(1), "image_index": torch.zeros(4, dtype=torch.long)}
    output = model(IDS, attention_mask=MASK, **same_image)
    assert all(len({tuple(row) for row in rows}) > 1 for rows in kept(output))
    # Another word changes the scores of [CLS], which has attended to it.
    other_word = IDS.clone()
    other_word[:, 1] = 11
    changed = model(other_word, attention_mask=MASK, **same_image)
    assert (changed.selection[0].scores - output.selection[0].scores).abs().amax(dim=1).min() > 1e-4


@pytest.mark.parametrize("guidance", ["text", "image", "random"])
@torch.no_grad()
def test_padding_and_batch_change_nothing(guidance):
    model = make_model(selection_guidance=guidance)
    together = model(IDS, images(4), MASK)
    for row in range(4):
        length = int(MASK[row].sum())
        alone = model(IDS[row : row + 1, :length], images(4)[row : row + 1])
        torch.testing.assert_close(
            alone.last_hidden_state[0], together.last_hidden_state[row, :length], rtol=1e-4, atol=1e-5
        )
        assert [rows[0] for rows in kept(alone)] == [rows[row] for rows in kept(together)]
    more = torch.nn.functional.pad(IDS, (0, 4), value=13), images(4), torch.nn.functional.pad(MASK, (0, 4))
    padded = model(*more)
    torch.testing.assert_close(
        padded.last_hidden_state[:, :5][MASK == 1], together.last_hidden_state[MASK == 1], rtol=1e-4, atol=1e-5
    )
    image = together.vision_model_output.last_hidden_state
    torch.testing.assert_close(padded.vision_model_output.last_hidden_state, image, rtol=1e-4, atol=1e-5)
    assert kept(padded) == kept(together)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = model(IDS[order], images(4)[order], MASK[order])
    torch.testing.assert_close(shuffled.last_hidden_state, together.last_hidden_state[order], rtol=1e-4, atol=1e-5)
    assert kept(shuffled) == [[rows[i] for i in order] for rows in kept(together)]


@pytest.mark.parametrize("as_cache", [False, True], ids=["pixels", "image_cache"])
@pytest.mark.parametrize("selection", [{}, {"selection_guidance": "image"}, {"keep_rate": 1.0}], ids=str)
def test_image_index_equals_repeated_images(selection, as_cache):
    results = []
    for shared in (True, False):
        model, pixel_values = make_model(**selection).double(), images(2).double().requires_grad_()
        if not shared:
            output = model(IDS, pixel_values[INDEX], MASK)
        elif as_cache:
            output = model(IDS, attention_mask=MASK, image_cache=model.encode_images(pixel_values), image_index=INDEX)
        else:
            output = model(IDS, pixel_values, MASK, image_index=INDEX)
        output.last_hidden_state.sin().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((output, pixel_values.grad, gradients))
    (output, *gradients), (expected, *expected_gradients) = results
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
    assert kept(output) == kept(expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fuse", [True, False])
def test_every_weight_is_trained_and_scores_get_their_gradient_through_the_fused_token(fuse):
    model = make_model(fuse_inattentive_tokens=fuse)
    output = model(IDS, images(4), MASK)
    output.last_hidden_state.sin().sum().backward(retain_graph=True)
    assert all(parameter.grad is not None for parameter in model.parameters())
    scores = output.selection[0].scores
    gradient = torch.autograd.grad(output.last_hidden_state.sin().sum(), scores, allow_unused=True)[0]
    assert (gradient is not None and gradient.norm() > 1e-4) == fuse


def test_outputs_of_every_layer():
    output = make_model("eager")(IDS, images(4), MASK, output_attentions=True, output_hidden_states=True)
    lengths = [5 + length for length in (17, 17, 10, 7, 7)]  # after the embeddings and after each layer
    assert [states.shape[1] for states in output.hidden_states] == lengths
    assert [tuple(weights.shape) for weights in output.attentions] == [(4, 2, n, n) for n in lengths[:-1]]
    assert output.cross_attentions is None
    assert output.vision_model_output.last_hidden_state.shape == (4, 7, 16)
    for weights in output.attentions:  # nothing attends to padding
        assert weights[..., :5].amax(dim=(1, 2))[MASK == 0].max() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and graphs


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_presets_and_configurations_of_a_single_stream():
    for preset in TripsConfig.presets():
        config = TripsConfig.from_preset(preset, fusion_type="single_stream")
        assert config.fusion_type == config.fusion_encoder_config.fusion_type == "single_stream"
        assert config.text_config.num_hidden_layers == 0
        assert TripsConfig(**config.to_diff_dict()).text_config.num_hidden_layers == 0
    config.fusion_type = "cross_attention"
    assert config.fusion_encoder_config.fusion_type == "cross_attention"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"text_config": {"hidden_size": 384}}, r"`text_config.hidden_size` must be 768.*got 384"),
        ({"vision_config": {"use_pre_layernorm": True}}, "`vision_config.use_pre_layernorm` must be False"),
    ],
)
def test_parts_that_cannot_be_joined_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        TripsConfig(**fields, fusion_type="single_stream")


def test_two_towers_do_not_become_one_stream_by_chance(tmp_path):
    TripsModel(TripsConfig.from_preset("tiny")).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="num_hidden_layers"):
        TripsModel.from_pretrained(tmp_path, fusion_type="single_stream")
    no_layers = {"fusion_type": "single_stream", "text_config": {"num_hidden_layers": 0}}
    model, report = TripsModel.from_pretrained(tmp_path, **no_layers, output_loading_info=True)
    assert report["missing_keys"] == {"vision_model.modality_embeddings.weight"}


@pytest.mark.parametrize("model_class", [TripsForRetrieval, TripsForPreTraining])
def test_features_of_an_image_alone_are_refused(model_class):
    with pytest.raises(ValueError, match=model_class.__name__):
        model_class(make_config())
