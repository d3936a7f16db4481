"""The vision tower against a naive loop implementation in values and gradients, and cached image states."""

import pytest
import torch
from naive_reference import NaiveVisionTower
from tiny_vision import (
    CLIP_STYLE,
    assert_same_selection,
    images,
    make_model,
    texts,
)


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
    "normalised": {"normalize_fusion_weights": True, "selection_layers": [1, 3]},
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
        dict(zip(config.selection_layers, config.keep_rates)),
        config.num_hidden_layers,
        config.num_attention_heads,
        patch_size,
        (config.image_size[0] // patch_size[0], config.image_size[1] // patch_size[1]),
        eps=config.layer_norm_eps,
        guidance=dict(zip(config.selection_layers, config.selection_guidances)),
        fuse=config.fuse_inattentive_tokens,
        normalize=config.normalize_fusion_weights,
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
        ({}, {"fuse_inattentive_tokens": False}),
        ({}, {"normalize_fusion_weights": True}),
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


def test_number_of_channels_must_be_the_configured_one():
    with pytest.raises(ValueError, match="pixel_values"):
        make_model()(images()[:, :1], texts())
