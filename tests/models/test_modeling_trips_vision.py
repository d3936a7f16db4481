"""The vision tower against a naive loop implementation and ViT, cached image states, and what texts share."""

import pytest
import torch
from naive_reference import NaiveVisionTower
from schedules import guidances_of, rates_of
from tiny_models import Case
from tiny_retrieval import calls_of
from tiny_vision import (
    CLIP_STYLE,
    assert_same_selection,
    images,
    make_model,
    texts,
)
from transformers import ViTConfig, ViTModel

from modeling_trips import TripsModel


CASES = {
    "one_layer": {},
    "first_layer": {"selection_layers": [1]},
    "last_layer": {"selection_layers": [3], "keep_rate": 0.3},
    "every_layer": {"selection_layers": [1, 2, 3], "keep_rate": 0.7},
    "rate_per_layer": {"selection_layers": [1, 3], "keep_rate": [0.8, 0.25]},
    "rate_1_in_between": {"selection_layers": [1, 2, 3], "keep_rate": [0.7, 1.0, 0.5]},
    "nothing_dropped_below_1": {"selection_layers": [2, 3], "keep_rate": [0.9, 0.5]},  # ceil(0.9 * 6) = 6
    "no_selection": {"selection_layers": []},
    "image_guidance": {"selection_guidance": "image", "selection_layers": [1, 3]},
    "text_then_image": {"selection_guidance": ["text", "image"], "selection_layers": [1, 2], "keep_rate": [0.7, 0.5]},
    "image_image_text": {"selection_guidance": ["image", "image", "text"], "selection_layers": [1, 2, 3]},
    "text_at_the_door": {"selection_guidance": ["image", "text"], "selection_layers": [2, 3], "keep_rate": [0.7, 0.3]},
    "no_fusing": {"fuse_inattentive_tokens": False, "selection_layers": [1, 3]},
    "clip_style": {**CLIP_STYLE, "selection_layers": [1, 2]},
    "no_qkv_bias": {"qkv_bias": False},
    "text_of_another_width": {"guidance_hidden_size": 5, "selection_layers": [1, 2]},
    "oblong_patches": {"patch_size": [4, 2]},
    "four_heads": {"num_attention_heads": 4},
}
RESOLUTIONS = {"square": (8, 8), "larger": (16, 12), "smaller": (8, 4), "wider": (4, 20), "turned": (8, 12)}


def assert_equals_reference(model, pixel_values, text_embeds):
    """Compare outputs, selection, and the gradient of every input and weight."""
    config = model.config
    patch_size = config.patch_size if isinstance(config.patch_size, list) else [config.patch_size] * 2
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.state_dict().items()}
    tower = NaiveVisionTower(
        weights,
        rates_of(config),
        config.num_hidden_layers,
        config.num_attention_heads,
        patch_size,
        (config.image_size[0] // patch_size[0], config.image_size[1] // patch_size[1]),
        eps=config.layer_norm_eps,
        guidance=guidances_of(config),
        fuse=config.fuse_inattentive_tokens,
        quick_gelu=config.hidden_act == "quick_gelu",
    )
    inputs = {"pixel_values": pixel_values, "text_embeds": text_embeds}
    ours = {name: value.clone().requires_grad_() for name, value in inputs.items() if value is not None}
    naive = {name: value.clone().requires_grad_() for name, value in inputs.items() if value is not None}
    output = model(**ours)
    expected = tower(naive["pixel_values"], naive.get("text_embeds"))
    expected_states = torch.cat([states for states, _ in expected])
    tokens = output.last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(tokens, expected_states, rtol=1e-5, atol=1e-5)
    expected_pooled = torch.stack([states[0] for states, _ in expected])
    torch.testing.assert_close(output.pooler_output, expected_pooled, rtol=1e-5, atol=1e-5)

    expected_selections = list(zip(*[selections for _, selections in expected]))
    assert len(output.selection) == len(expected_selections)
    for selection, entries in zip(output.selection, expected_selections):
        assert selection.kept_indices.tolist() == [kept for kept, _, _ in entries]
        assert selection.candidate_indices.tolist() == [candidates for _, _, candidates in entries]
        expected_scores = torch.stack([scores for _, scores, _ in entries]).float()
        torch.testing.assert_close(selection.scores.float(), expected_scores, rtol=1e-5, atol=1e-6)

    direction = torch.randn(expected_states.shape, dtype=torch.float64)
    (tokens * direction).sum().backward()
    (expected_states * direction).sum().backward()
    pairs = [(value.grad, naive[name].grad) for name, value in ours.items()]
    pairs += [(parameter.grad, weights[name].grad) for name, parameter in model.named_parameters()]
    for gradient, expected_gradient in pairs:
        assert (gradient is None) == (expected_gradient is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_equals_the_naive_reference(fields):
    model = make_model(**fields).double()
    width = model.config.guidance_hidden_size or 8
    assert_equals_reference(model, images(dtype=torch.float64), texts(width=width, dtype=torch.float64))


@pytest.mark.parametrize("size", RESOLUTIONS.values(), ids=RESOLUTIONS)
def test_equals_the_naive_reference_at_other_resolutions(size):
    model = make_model(selection_layers=[1, 3], keep_rate=0.6).double()
    assert_equals_reference(model, images(size=size, dtype=torch.float64), texts(dtype=torch.float64))


def test_without_a_text_the_image_guides_itself():
    model = make_model(selection_layers=[1, 3]).double()
    assert_equals_reference(model, images(dtype=torch.float64), None)
    by_image = make_model(selection_layers=[1, 3], selection_guidance="image").double()
    output, expected = model(images(dtype=torch.float64)), by_image(images(dtype=torch.float64), texts())
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert_same_selection(output.selection, expected.selection)


def test_sequence_lengths_of_the_paper():
    config = {"image_size": 56, "patch_size": 4, "selection_layers": [1, 2], "keep_rate": 0.7}  # 14 x 14 patches
    output = make_model(**config)(images(1, (56, 56)), texts(1), output_hidden_states=True)
    # 197 -> 1 + ceil(0.7 * 196) + 1 = 140 -> 1 + ceil(0.7 * 139) + 1 = 100
    assert [states.shape[1] for states in output.hidden_states] == [197, 140, 100, 100]
    assert [entry.kept_indices.shape[1] for entry in output.selection] == [138, 98]
    assert [entry.scores.shape[1] for entry in output.selection] == [196, 139]


BY_IMAGE_THEN_TEXT = {"selection_layers": [1, 3], "selection_guidance": ["image", "text"], "keep_rate": [0.5, 0.5]}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"keep_rate": [0.4, 0.5]}),
        ({}, {"selection_layers": [2, 3]}),
        ({"selection_layers": [2], "selection_guidance": ["text"], "keep_rate": [0.5]}, {}),
        ({"selection_layers": [], "selection_guidance": "text", "keep_rate": 0.5}, {}),
        ({}, {"selection_guidance": ["random", "text"]}),
    ],
    ids=str,
)
def test_an_image_cache_of_other_settings_before_the_text_is_refused(before, after):
    model, changed = (make_model(**{**BY_IMAGE_THEN_TEXT, **fields}) for fields in (before, after))
    for source, target in ((model, changed), (changed, model)):
        image_cache = source.encode_images(images(2))
        schedule = target.config.schedule
        with pytest.raises(ValueError) as raised:
            source(image_cache=image_cache, text_embeds=texts(2), schedule=schedule)
        assert str(image_cache.schedule) in str(raised.value) and str(schedule) in str(raised.value)


def test_an_image_cache_of_other_settings_behind_the_text_is_used():
    model = make_model(**BY_IMAGE_THEN_TEXT)
    image_cache = model.encode_images(images(2))
    model.config.keep_rate = [0.5, 0.4]
    expected = model(images(2), texts(2)).last_hidden_state
    torch.testing.assert_close(model(image_cache=image_cache, text_embeds=texts(2)).last_hidden_state, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Without selection, captured outputs, stem, random guidance


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


# ---------------------------------------------------------------------------------------------------------------------
# Computation that texts of an image share


INDEX = torch.tensor([1, 0, 1, 1])


CASE = Case(TripsModel)
IMAGES = CASE.make_inputs()["pixel_values"][:2]


def make_inputs(**images):
    """Return four texts about two images."""
    return {**CASE.make_inputs(), "pixel_values": IMAGES, "image_index": INDEX, **images}


@pytest.mark.parametrize(
    ("guidance", "rows"),
    [
        (["image", "text"], [(2, 2), (2, 2), (2, 4)]),  # patches are chosen between a layer's two halves
        (["text", "image"], [(2, 2), (2, 4), (4, 4)]),
        ("text", [(2, 2), (2, 4), (4, 4)]),
        ("image", [(2, 2), (2, 2), (2, 2)]),
    ],
    ids=str,
)
def test_layers_run_once_per_image_until_a_text_guides(guidance, rows):
    model = CASE.make_model(selection_layers=[2, 3], selection_guidance=guidance)
    halves = [(layer.attention.k_proj, layer.mlp.fc1) for layer in model.vision_model.layers]

    def count(module) -> int:
        (rows,) = calls_of(module, lambda: model(**make_inputs()))
        return rows

    assert [(count(attention), count(mlp)) for attention, mlp in halves] == rows


@pytest.mark.parametrize(
    ("fields", "rows"),
    [({"selection_guidance": "image"}, 2), ({"keep_rate": 1.0}, 2), ({"selection_layers": []}, 2), ({}, 4)],
    ids=str,
)
@pytest.mark.parametrize("fusion_type", ["cross_attention", "skip_connected"])
def test_keys_and_values_of_untouched_image_tokens_are_projected_once_per_image(fields, rows, fusion_type):
    model = CASE.make_model(**fields, fusion_type=fusion_type)
    cross = model.fusion_model.encoder.layer[0].crossattention.self
    for projection in (cross.key, cross.value):
        assert calls_of(projection, lambda: model(**make_inputs())) == [rows]


def test_an_image_cache_carries_what_was_kept_so_far():
    model = CASE.make_model(selection_guidance=["image", "text"])
    cache = model.encode_images(IMAGES)
    assert cache.next_layer == 3 and [layer.kept_indices.shape for layer in cache.selection] == [(2, 39)]
    assert cache.candidate_indices[:, -1].tolist() == [-1, -1]
    output = model(**make_inputs(pixel_values=None, image_cache=cache))
    assert torch.equal(output.selection[0].kept_indices, cache.selection[0].kept_indices[INDEX])
    assert torch.equal(output.selection[1].candidate_indices, cache.candidate_indices[INDEX])
