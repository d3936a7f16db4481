"""Retrieval: features for indexing, matching against the model on each pair, and both losses."""

import pytest
import torch
from tiny_retrieval import (
    IMAGE_INDEX,
    MASK,
    PAIR_IDS,
    TEXTS,
    calls_of,
    gradients,
    images,
    kept,
    make_model,
    matched_alone,
    run,
)
from torch.nn.functional import cross_entropy

from modeling_trips.modeling_trips_pretraining import matching_pairs
from modeling_trips.patch_selection import region_targets, selection_loss


@torch.no_grad()
def test_padding_and_batch_change_no_feature():
    model, order = make_model(), torch.tensor([3, 1, 0, 2])
    image_features = model.get_image_features(images()).pooler_output
    text_features = model.get_text_features(TEXTS, MASK).pooler_output
    torch.testing.assert_close(model.get_image_features(images()[order]).pooler_output, image_features[order])
    from_cache = model.get_image_features(image_cache=model.model.encode_images(images())).pooler_output
    torch.testing.assert_close(from_cache, image_features)
    torch.testing.assert_close(model.get_text_features(TEXTS[order], MASK[order]).pooler_output, text_features[order])
    for row in range(4):
        alone = model.get_text_features(TEXTS[row : row + 1, : int(MASK[row].sum())]).pooler_output
        torch.testing.assert_close(alone[0], text_features[row])


@torch.no_grad()
def test_logits_compare_all_images_with_all_texts():
    model = make_model()
    output = model(TEXTS[:3], images(1), MASK[:3])  # as many as one likes
    image_features = model.get_image_features(images(1)).pooler_output
    text_features = model.get_text_features(TEXTS[:3], MASK[:3]).pooler_output
    torch.testing.assert_close(output.logits_per_image, image_features @ text_features.T / 0.07)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    assert torch.equal(output.text_embeds, text_features)
    assert output.loss is output.itm_logits is None
    assert kept(output) == kept(model.get_image_features(images(1)))


@torch.no_grad()
def test_matching_many_pairs_equals_matching_each_alone():
    model = make_model()
    text_index, image_index = torch.tensor([0, 0, 5, 3, 2, 2, 1]), torch.tensor([1, 3, 3, 0, 1, 0, 2])
    expected = torch.stack([matched_alone(model, *pair) for pair in zip(text_index.tolist(), image_index.tolist())])
    pairs = {"text_index": text_index, "image_index": image_index, "attention_mask": MASK}
    output = model.match(TEXTS, images(), **pairs)
    torch.testing.assert_close(output.itm_logits, expected)
    text_states = model.get_text_features(TEXTS, MASK).last_hidden_state
    reused = model.match(text_states=text_states, image_cache=model.model.encode_images(images()), **pairs)
    torch.testing.assert_close(reused.itm_logits, expected)
    one_to_one = model.match(TEXTS[text_index], images()[image_index], MASK[text_index])
    torch.testing.assert_close(one_to_one.itm_logits, expected)
    assert kept(output) == kept(reused) == kept(one_to_one)
    assert len(kept(output)[0]) == 7


def test_bad_inputs():
    model = make_model()
    with pytest.raises(ValueError, match="image_index"):
        run(model, image_index=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="image_ids"):
        run(model, image_ids=PAIR_IDS)
    with pytest.raises(ValueError, match="itc_weight"):
        run(make_model(itc_weight=0.0, itm_weight=0.0))
    with pytest.raises(ValueError, match="image_index"):
        model.match(TEXTS, images(), MASK)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


@torch.no_grad()
@pytest.mark.parametrize(
    ("selection_guidance", "attention", "mlp"),
    [
        ("text", [4, 18], [4, 18]),  # each image for its feature; true and negative pairs
        (["image", "text"], [4, 4], [4, 18]),  # the layer that a text scores runs for features and for pairs
        ("image", [4], [4]),
    ],
    ids=str,
)
def test_negatives_cost_no_second_pass_over_the_image(selection_guidance, attention, mlp):
    model = make_model(selection_guidance=selection_guidance)
    first, *_, last = model.model.vision_model.layers
    assert calls_of(first, lambda: run(model)) == [4]
    assert calls_of(last.attention.k_proj, lambda: run(model)) == attention
    assert calls_of(last.mlp.fc1, lambda: run(model)) == mlp
    assert calls_of(model.model.text_model, lambda: run(model)) == [6]


@torch.no_grad()
def test_a_weight_of_0_skips_the_contrastive_loss():
    model = make_model(itc_weight=0.0)
    output = run(model)
    assert torch.equal(output.loss, output.itm_loss)
    torch.manual_seed(0)
    pairs = matching_pairs(torch.zeros(6, 6), PAIR_IDS)  # all as likely
    expected = model.match(
        TEXTS, images(), MASK, text_index=pairs.text_index, image_index=IMAGE_INDEX[pairs.image_index]
    )
    torch.testing.assert_close(output.itm_logits, expected.itm_logits)


def test_a_batch_of_one_image_trains_on_its_true_pairs():
    model = make_model()
    index = torch.zeros(3, dtype=torch.long)
    output = model(TEXTS[:3], images(1), MASK[:3], image_index=index, return_loss=True)
    torch.testing.assert_close(output.itm_loss, cross_entropy(output.itm_logits[:3], index + 1))
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("value, used", [(0.07, 0.07), (-1.0, 0.001), (3.0, 0.5)])
def test_temperature_is_clamped_when_it_is_used(value, used):
    model = make_model()
    with torch.no_grad():
        model.temp.weight.fill_(value)
    output = run(model)
    torch.testing.assert_close(output.logits_per_text, output.text_embeds @ output.image_embeds.T / used)
    output.itc_loss.backward()
    assert model.temp.weight.item() == pytest.approx(value)
    assert (model.temp.weight.grad.item() != 0) == (value == used)


# ---------------------------------------------------------------------------------------------------------------------
# Patch selection


def test_texts_are_taught_what_to_see_of_their_own_images():
    model = make_model(selection_guidance=["image", "text"]).train()
    regions = torch.cat([torch.rand(len(TEXTS), 2), torch.full((len(TEXTS), 2), 0.5)], dim=-1)
    targets = region_targets(regions, model.config.vision_config.grid_size)
    output, plain = run(model, regions=regions), run(model)
    union = torch.stack([targets[IMAGE_INDEX == image].amax(dim=0) for image in IMAGE_INDEX])
    expected = [
        selection_loss(layer.scores, layer.candidate_indices, wanted)
        for layer, wanted in zip(output.selection, (union, targets), strict=True)
    ]
    torch.testing.assert_close(output.selection_loss, torch.stack(expected).mean())
    torch.testing.assert_close(output.loss, plain.loss + 0.5 * output.selection_loss)
    assert plain.selection_loss is None and run(model.eval(), regions=regions).selection_loss is None
