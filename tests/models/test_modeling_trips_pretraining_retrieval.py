"""Retrieval: features for indexing, matching against the model on each pair, and both losses."""

import pytest
import torch
from tiny_retrieval import (
    IMAGE_IDS,
    IMAGE_INDEX,
    MASK,
    PAIR_IDS,
    TEXTS,
    gradients,
    images,
    kept,
    make_model,
    matched_alone,
    pairs_of,
    run,
)
from torch.nn.functional import cross_entropy, normalize

from modeling_trips.patch_selection import region_targets, selection_loss


@torch.no_grad()
def test_features_are_normalised_projections_of_each_tower_alone():
    model = make_model()
    image_features = model.get_image_features(images())
    text_features = model.get_text_features(TEXTS, MASK)
    vision, text = model.model.vision_model(images()), model.model.text_model(TEXTS, MASK)
    expected = normalize(model.vision_proj(vision.last_hidden_state[:, 0]), dim=-1)
    torch.testing.assert_close(image_features.pooler_output, expected)
    expected = normalize(model.text_proj(text.last_hidden_state[:, 0]), dim=-1)
    torch.testing.assert_close(text_features.pooler_output, expected)
    assert image_features.pooler_output.shape == (4, 8) and text_features.pooler_output.shape == (6, 8)
    assert kept(image_features) == kept(vision)
    from_cache = model.get_image_features(image_cache=model.model.encode_images(images()))
    torch.testing.assert_close(from_cache.pooler_output, image_features.pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("with_loss", [False, True])
def test_no_text_changes_the_features_of_an_image(with_loss):
    model = make_model()
    expected = model.get_image_features(images()).pooler_output
    for texts in (TEXTS, TEXTS.flip(1)):
        output = model(texts, images(), MASK, image_index=IMAGE_INDEX, return_loss=with_loss)
        torch.testing.assert_close(output.image_embeds, expected)
    assert kept(model.get_image_features(images())) != kept(model.model(TEXTS[:4], images(), MASK[:4]))


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
@pytest.mark.parametrize("selection_guidance", ["text", "image"])
def test_matching_many_pairs_equals_matching_each_alone(selection_guidance):
    model = make_model(selection_guidance=selection_guidance)
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


GUIDANCES = ["text", "image", ["image", "text"]]  # the last schedule has a last layer scored by the text

# ---------------------------------------------------------------------------------------------------------------------
# Losses


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [*({"selection_guidance": guidance} for guidance in GUIDANCES), {"pooling_mode": "mean"}], ids=str
)
def test_every_pair_is_matched_under_its_own_text(fields):
    model = make_model(**fields)
    output = run(model)
    pairs = pairs_of(output)
    images_of_pairs = IMAGE_INDEX[pairs.image_index]
    expected = [matched_alone(model, *pair) for pair in zip(pairs.text_index.tolist(), images_of_pairs.tolist())]
    torch.testing.assert_close(output.itm_logits, torch.stack(expected))
    torch.testing.assert_close(output.itm_loss, cross_entropy(torch.stack(expected), pairs.labels))
    assert pairs.text_index[:6].tolist() == list(range(6)) and images_of_pairs[:6].tolist() == IMAGE_INDEX.tolist()
    assert (PAIR_IDS[pairs.text_index[6:]] != IMAGE_IDS[images_of_pairs[6:]]).all()
    assert kept(output) == kept(model.model(TEXTS, images(), MASK, image_index=IMAGE_INDEX))


@pytest.mark.parametrize("num_texts", [1, 3])
def test_a_batch_of_one_image_trains_on_its_true_pairs(num_texts):
    model = make_model()
    index = torch.zeros(num_texts, dtype=torch.long)
    output = model(TEXTS[:num_texts], images(1), MASK[:num_texts], image_index=index, return_loss=True)
    labels = torch.ones(num_texts, dtype=torch.long)
    torch.testing.assert_close(output.itm_loss, cross_entropy(output.itm_logits[:num_texts], labels))
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("value, used", [(0.07, 0.07), (0.0001, 0.001), (-1.0, 0.001), (3.0, 0.5)])
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
# Training


# ---------------------------------------------------------------------------------------------------------------------
# Patch selection


@pytest.mark.parametrize("selection_guidance", ["text", ["image", "text"]], ids=str)
def test_texts_are_taught_what_to_see_of_their_own_images(selection_guidance):
    model = make_model(selection_guidance=selection_guidance).train()
    regions = torch.cat([torch.rand(len(TEXTS), 2), torch.full((len(TEXTS), 2), 0.5)], dim=-1)
    targets = region_targets(regions, model.config.vision_config.grid_size)
    output, plain = run(model, regions=regions), run(model)
    union = torch.stack([targets[IMAGE_INDEX == image].amax(dim=0) for image in IMAGE_INDEX])
    guidances = [settings.guidance for settings in model.config.vision_config.schedule.selections]
    expected = [
        selection_loss(layer.scores, layer.candidate_indices, targets if guide == "text" else union)
        for layer, guide in zip(output.selection, guidances)
    ]
    torch.testing.assert_close(output.selection_loss, torch.stack(expected).mean())
    torch.testing.assert_close(output.loss, plain.loss + 0.5 * output.selection_loss)
    assert plain.selection_loss is None and run(model.eval(), regions=regions).selection_loss is None


def test_nothing_is_taught_where_nothing_is_matched():
    model = make_model(itm_weight=0.0).train()
    output = run(model, regions=torch.tensor([[0.5, 0.5, 0.5, 0.5]] * len(TEXTS)))
    assert output.selection_loss is None
