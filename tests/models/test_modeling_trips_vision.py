"""The vision tower against a naive loop implementation and ViT, cached image states, and what texts share."""

import pytest
import torch
from naive_reference import NaiveVisionTower
from tiny_models import Case
from tiny_retrieval import calls_of
from tiny_vision import CLIP_STYLE, images, make_model, texts
from torch.testing import assert_close

from modeling_trips import TripsModel


CASES = {
    "last_layer": {"schedule": "3:text:0.3"},
    "every_layer": {"schedule": "1,2,3"},
    "rate_per_layer": {"schedule": "1:text:0.8,3:text:0.25"},
    "nothing_dropped_below_1": {"schedule": "2:text:0.9,3:text:0.5"},  # ceil(0.9 * 6) = 6
    "no_selection": {"schedule": "unpruned"},
    "image_guidance": {"schedule": "1:image:0.5,3:image:0.5"},
    "text_then_image": {"schedule": "1:text:0.7,2:image:0.5"},
    "text_at_the_door": {"schedule": "2:image:0.7,3:text:0.3"},
    "no_fusing": {"fuse_inattentive_tokens": False, "schedule": "1:text:0.5,3:text:0.5"},
    "clip_style": {**CLIP_STYLE, "schedule": "1:text:0.5,2:text:0.5"},
    "text_of_another_width": {"guidance_hidden_size": 5, "schedule": "1:text:0.5,2:text:0.5"},
    "oblong_patches": {"patch_size": [4, 2]},
}


def assert_equals_reference(model, pixel_values, text_embeds):
    """Compare outputs, selection, and the gradient of every input and weight."""
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in model.state_dict().items()}
    tower = NaiveVisionTower(weights, model.config)
    inputs = {"pixel_values": pixel_values}
    if text_embeds is not None:
        inputs["text_embeds"] = text_embeds
    ours = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    naive = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    output = model(**ours)
    expected = tower(naive["pixel_values"], naive.get("text_embeds"))
    expected_states = torch.cat([states for states, _ in expected])
    tokens = output.last_hidden_state.flatten(0, 1)
    assert_close(tokens, expected_states, rtol=1e-5, atol=1e-5)
    expected_pooled = torch.stack([states[0] for states, _ in expected])
    assert_close(output.pooler_output, expected_pooled, rtol=1e-5, atol=1e-5)

    expected_by_layer = zip(*[selections for _, selections in expected])
    for selection, entries in zip(output.selection, expected_by_layer, strict=True):
        kept, scores, candidates = zip(*entries)
        assert selection.kept_indices.tolist() == list(kept)
        assert selection.candidate_indices.tolist() == list(candidates)
        assert_close(selection.scores.double(), torch.stack(scores), rtol=1e-5, atol=1e-6)

    direction = torch.randn(expected_states.shape, dtype=torch.float64)
    (tokens * direction).sum().backward()
    (expected_states * direction).sum().backward()
    pairs = [(value.grad, naive[name].grad) for name, value in ours.items()]
    pairs += [(parameter.grad, weights[name].grad) for name, parameter in model.named_parameters()]
    for gradient, expected_gradient in pairs:
        assert (gradient is None) == (expected_gradient is None)
        if gradient is not None:
            assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_equals_the_naive_reference(fields):
    model = make_model(**fields).double()
    width = model.config.guidance_hidden_size or 8
    assert_equals_reference(model, images(dtype=torch.float64), texts(width=width, dtype=torch.float64))


@pytest.mark.parametrize("size, with_text", [((16, 12), True), ((4, 20), True), ((12, 8), False)])
def test_equals_it_at_other_resolutions_and_without_a_text(size, with_text):
    model = make_model(schedule="1:text:0.6,3:text:0.6").double()
    text_embeds = texts(dtype=torch.float64) if with_text else None  # else the image guides itself
    assert_equals_reference(model, images(size=size, dtype=torch.float64), text_embeds)


BY_IMAGE_THEN_TEXT = "1:image:0.5,3:text:0.5"


@pytest.mark.parametrize("schedule", ["1:image:0.4,3:text:0.5", "unpruned", "1:random:0.5,3:text:0.5"])
def test_an_image_cache_of_other_settings_before_the_text_is_refused(schedule):
    model = make_model(schedule=BY_IMAGE_THEN_TEXT)
    changed = make_model(schedule=schedule)
    for source, target in ((model, changed), (changed, model)):
        image_cache = source.encode_images(images(2))
        with pytest.raises(ValueError):
            source(image_cache=image_cache, text_embeds=texts(2), schedule=target.config.schedule)


def test_an_image_cache_of_other_settings_behind_the_text_is_used():
    model = make_model(schedule=BY_IMAGE_THEN_TEXT)
    image_cache = model.encode_images(images(2))
    model.config.schedule = "1:image:0.5,3:text:0.4"
    expected = model(images(2), texts(2))
    output = model(image_cache=image_cache, text_embeds=texts(2))
    assert_close(output.last_hidden_state, expected.last_hidden_state)


def test_convolutional_stem_gives_the_same_grid():
    model = make_model(patch_embedding_type="convolutional", image_size=[16, 24], patch_size=8)
    stem = model.embeddings.patch_embeddings
    pixel_values = images(1, (16, 24))
    patches = stem(pixel_values)
    assert patches.shape == (1, 6, 8)
    # Row-major: moving only the lower left corner of the image moves that patch (number 3) most.
    pixel_values[..., 8:, :8] += 1.0
    difference = stem(pixel_values) - patches
    assert difference.norm(dim=-1).argmax() == 3


@pytest.mark.parametrize("training", [False, True])
def test_random_guidance_keeps_other_patches_of_each_image(training):
    model = make_model(image_size=32, schedule="1:random:0.6")
    output = model.train(training)(images(4, (32, 32)), texts(4))
    kept = output.selection[0].kept_indices
    assert kept.shape == (4, 39)  # ceil(0.6 * 64)
    assert not (kept == kept[0]).all()


CASE = Case(TripsModel)


def make_inputs():
    """Return four texts about two images."""
    inputs = CASE.make_inputs()
    return {**inputs, "pixel_values": inputs["pixel_values"][:2], "image_index": torch.tensor([1, 0, 1, 1])}


@pytest.mark.parametrize(
    "schedule, rows, rows_of_fusion",
    [
        ("2:image:0.6,3:text:0.6", [(2, 2), (2, 2), (2, 4)], 4),  # patches are chosen between a layer's two halves
        ("2:text:0.6,3:image:0.6", [(2, 2), (2, 4), (4, 4)], 4),
        ("1:image:0.6,3:image:0.6", [(2, 2)] * 3, 2),
        ("unpruned", [(2, 2)] * 3, 2),
    ],
)
def test_layers_run_once_per_image_until_a_text_guides(schedule, rows, rows_of_fusion):
    """So do the projections of keys and values in the fusion."""
    model = CASE.make_model(schedule=schedule)
    inputs = make_inputs()
    for layer, (rows_of_attention, rows_of_mlp) in zip(model.vision_model.layers, rows, strict=True):
        assert calls_of(layer.attention.k_proj, lambda: model(**inputs)) == [rows_of_attention]
        assert calls_of(layer.mlp.fc1, lambda: model(**inputs)) == [rows_of_mlp]
    cross = model.fusion_model.encoder.layer[0].crossattention.self
    for projection in (cross.key, cross.value):
        assert calls_of(projection, lambda: model(**inputs)) == [rows_of_fusion]
