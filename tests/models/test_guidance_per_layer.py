"""Guidance per layer: computation that texts share, and the first layer that runs for each text."""

import pytest
import torch
from schedules import guidances_of
from test_modeling_trips import IDS, INDEX, MASK, images, kept, make_model

from modeling_trips import TripsModel, TripsVisionConfig, use_schedule


def rows_seen(module, call) -> list[int]:
    """Return the number of rows of each input of `module` during `call()`."""
    seen = []
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    call()
    hook.remove()
    return seen


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
    model = make_model(selection_layers=[2, 3], selection_guidance=guidance)
    halves = [(layer.attention.k_proj, layer.mlp.fc1) for layer in model.vision_model.layers]

    def count(module) -> int:
        (rows,) = rows_seen(module, lambda: model(IDS, images(2), MASK, image_index=INDEX))
        return rows

    assert [(count(attention), count(mlp)) for attention, mlp in halves] == rows


@pytest.mark.parametrize(
    "fields", [{"selection_guidance": "image"}, {"keep_rate": 1.0}, {"selection_layers": []}], ids=str
)
@pytest.mark.parametrize("fusion_type", ["cross_attention", "skip_connected"])
def test_keys_and_values_of_untouched_image_tokens_are_projected_once_per_image(fields, fusion_type):
    model = make_model(**fields, fusion_type=fusion_type, skip_stride=1)
    cross = model.fusion_model.encoder.layer[0].crossattention.self
    for projection in (cross.key, cross.value):
        assert rows_seen(projection, lambda: model(IDS, images(2), MASK, image_index=INDEX)) == [2]
    by_text = make_model(fusion_type=fusion_type, skip_stride=1)
    cross = by_text.fusion_model.encoder.layer[0].crossattention.self
    assert rows_seen(cross.key, lambda: by_text(IDS, images(2), MASK, image_index=INDEX)) == [4]


def test_an_image_cache_carries_what_was_kept_so_far():
    model = make_model(selection_layers=[1, 3], selection_guidance=["image", "text"])
    image_cache = model.encode_images(images(2))
    assert image_cache.next_layer == 3 and [layer.kept_indices.shape for layer in image_cache.selection] == [(2, 8)]
    assert image_cache.candidate_indices[:, -1].tolist() == [-1, -1]
    output = model(IDS, attention_mask=MASK, image_cache=image_cache, image_index=INDEX)
    assert torch.equal(output.selection[0].kept_indices, image_cache.selection[0].kept_indices[INDEX])
    assert torch.equal(output.selection[1].candidate_indices, image_cache.candidate_indices[INDEX])


def test_an_image_cache_of_another_schedule_is_refused():
    model = make_model(selection_layers=[1, 3], selection_guidance=["image", "text"])
    image_cache = model.encode_images(images(2))
    with pytest.raises(ValueError, match="select_patches"):
        model.vision_model(image_cache=image_cache, select_patches=False)
    other = make_model(selection_layers=[1, 3], selection_guidance=["text", "image"]).vision_model.schedule
    with pytest.raises(ValueError, match="image_cache"), use_schedule(model, other):
        model(IDS, attention_mask=MASK, image_cache=image_cache, image_index=INDEX)


def test_the_pass_without_a_text_is_the_same_trunk():
    model = make_model(selection_layers=[1, 3], selection_guidance=["image", "text"])
    image_cache = model.encode_images(images(2))
    for output in (model.vision_model(images(2)), model.vision_model(image_cache=image_cache)):
        assert torch.equal(output.selection[0].kept_indices, image_cache.selection[0].kept_indices)
    # The text only selects before the fusion encoder, so that the compared states do not depend on it.
    texts = torch.randn(4, 16)
    pooled = model.vision_model(text_embeds=texts, image_cache=image_cache, image_index=INDEX).pooler_output
    torch.testing.assert_close(pooled, model.vision_model(image_cache=image_cache).pooler_output[INDEX])


def test_a_checkpoint_keeps_its_guidance(tmp_path):
    model = make_model(selection_layers=[1, 3], selection_guidance=["image", "text"])
    model.save_pretrained(tmp_path)
    loaded = TripsModel.from_pretrained(tmp_path)
    assert loaded.config.selection_guidance == ["image", "text"]
    assert kept(loaded(IDS, images(4), MASK)) == kept(model(IDS, images(4), MASK))
    by_image = TripsModel.from_pretrained(tmp_path, selection_guidance="image")
    assert by_image.config.vision_config.schedule.first_text_layer is None
