"""Retrieval: features for indexing, matching against the model on each pair, and checkpoints."""

import pytest
import torch
from tiny_retrieval import (
    IMAGE_INDEX,
    MASK,
    PAIR_IDS,
    TEXTS,
    calls_of,
    images,
    kept,
    make_model,
    matched_alone,
    run,
)
from torch.nn.functional import normalize


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
def test_padding_and_batch_change_no_feature():
    model, order = make_model(), torch.tensor([3, 1, 0, 2])
    image_features = model.get_image_features(images()).pooler_output
    text_features = model.get_text_features(TEXTS, MASK).pooler_output
    torch.testing.assert_close(model.get_image_features(images()[order]).pooler_output, image_features[order])
    torch.testing.assert_close(model.get_text_features(TEXTS[order], MASK[order]).pooler_output, text_features[order])
    for row in range(4):
        alone = model.get_text_features(TEXTS[row : row + 1, : int(MASK[row].sum())]).pooler_output
        torch.testing.assert_close(alone[0], text_features[row])
        torch.testing.assert_close(
            model.get_image_features(images()[row : row + 1]).pooler_output[0], image_features[row]
        )


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


@torch.no_grad()
def test_matching_encodes_each_text_and_each_image_once():
    model = make_model()
    text_index, image_index = torch.arange(6).repeat_interleave(4), torch.arange(4).repeat(6)

    def match():
        model.match(TEXTS, images(), MASK, text_index=text_index, image_index=image_index)

    assert calls_of(model.model.text_model.encoder.layer[0], match) == [6]
    assert calls_of(model.model.vision_model.layers[0], match) == [4]
    assert calls_of(model.model.fusion_model.encoder.layer[0], match) == [24]


def test_bad_inputs():
    model = make_model()
    with pytest.raises(ValueError, match="image_index"):
        run(model, image_index=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="image_ids"):
        run(model, image_ids=PAIR_IDS)
    with pytest.raises(ValueError, match="itc_weight"):
        run(make_model(itc_weight=0.0, itm_weight=0.0))
    with pytest.raises(ValueError, match="text_states"):
        model.match(pixel_values=images())
    with pytest.raises(ValueError, match="image_cache"):
        model.match(TEXTS)
    with pytest.raises(ValueError, match="image_index"):
        model.match(TEXTS, images(), MASK)
