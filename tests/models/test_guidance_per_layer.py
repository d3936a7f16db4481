"""Guidance per layer: computation that texts share, and the first layer that runs for each text."""

import pytest
import torch
from schedules import guidances_of
from tiny_models import Case
from tiny_retrieval import calls_of

from modeling_trips import TripsModel, TripsVisionConfig


INDEX = torch.tensor([1, 0, 1, 1])


CASE = Case(TripsModel)
IMAGES = CASE.make_inputs()["pixel_values"][:2]


def make_inputs(**images):
    """Return four texts about two images."""
    return {**CASE.make_inputs(), "pixel_values": IMAGES, "image_index": INDEX, **images}


def test_the_image_cache_ends_at_the_first_layer_that_a_text_guides():
    schedules = {
        ("image", "image", "text"): 9,
        ("image", "text", "image"): 6,
        ("text", "image", "text"): 3,
        ("image", "random", "image"): None,
    }
    for guidance, first_text_layer in schedules.items():
        config = TripsVisionConfig(selection_layers=[3, 6, 9], selection_guidance=guidance)
        assert config.schedule.first_text_layer == first_text_layer
        assert guidances_of(config) == dict(zip([3, 6, 9], guidance))
    config = TripsVisionConfig(selection_layers=[3, 6], selection_guidance=["text", "image"], keep_rate=[1.0, 0.5])
    assert config.schedule.first_text_layer is None and guidances_of(config) == {6: "image"}


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


def test_the_pass_without_a_text_is_the_same_trunk():
    model = CASE.make_model(selection_guidance=["image", "text"])
    cache = model.encode_images(IMAGES)
    for output in (model.vision_model(IMAGES), model.vision_model(image_cache=cache)):
        assert torch.equal(output.selection[0].kept_indices, cache.selection[0].kept_indices)
    # The text only selects before the fusion encoder, so that the compared states do not depend on it.
    pooled = model.vision_model(text_embeds=torch.randn(4, 48), image_cache=cache, image_index=INDEX).pooler_output
    torch.testing.assert_close(pooled, model.vision_model(image_cache=cache).pooler_output[INDEX])
