"""Retrieval: features, matching against the model on each pair, and both losses with their hard negatives by hand."""

import math

import pytest
import torch
from tiny_models import kept_by
from tiny_retrieval import (
    IMAGE_INDEX,
    MASK,
    PAIR_IDS,
    TEXTS,
    images,
    make_model,
    matched_alone,
    run,
)
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from modeling_trips.modeling_trips_pretraining import (
    contrastive_loss,
    hard_negative_indices,
    matching_loss,
    matching_pairs,
    similarity,
)
from modeling_trips.patch_selection import region_targets, selection_loss


@torch.no_grad()
def test_logits_compare_all_images_with_all_texts():
    model = make_model()
    output = model(TEXTS[:3], images(1), MASK[:3])
    vision = model.get_image_features(images(1))
    image_cache = model.model.encode_images(images(1))
    cached = model.get_image_features(image_cache=image_cache)
    assert_close(cached.pooler_output, vision.pooler_output)
    text_features = model.get_text_features(TEXTS[:3], MASK[:3]).pooler_output
    assert_close(output.logits_per_image, vision.pooler_output @ text_features.T / 0.07)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    assert torch.equal(output.text_embeds, text_features)
    assert output.loss is None
    assert output.itm_logits is None
    assert kept_by(output) == kept_by(vision)


@torch.no_grad()
def test_matching_many_pairs_equals_matching_each_alone():
    model = make_model()
    text_index = torch.tensor([0, 0, 5, 3, 2, 2, 1])
    image_index = torch.tensor([1, 3, 3, 0, 1, 0, 2])
    pairs = zip(text_index.tolist(), image_index.tolist())
    expected = torch.stack([matched_alone(model, text, image) for text, image in pairs])
    index = {"text_index": text_index, "image_index": image_index, "attention_mask": MASK}
    output = model.match(TEXTS, images(), **index)
    assert_close(output.itm_logits, expected)
    text_states = model.get_text_features(TEXTS, MASK).last_hidden_state
    image_cache = model.model.encode_images(images())
    reused = model.match(text_states=text_states, image_cache=image_cache, **index)
    assert_close(reused.itm_logits, expected)
    one_to_one = model.match(TEXTS[text_index], images()[image_index], MASK[text_index])
    assert_close(one_to_one.itm_logits, expected)
    assert kept_by(output) == kept_by(reused) == kept_by(one_to_one)
    assert len(kept_by(output)[0]) == 7


def test_bad_inputs():
    model = make_model()
    with pytest.raises(ValueError, match="image_ids"):
        run(model, image_ids=PAIR_IDS)
    with pytest.raises(ValueError, match="itc_weight"):
        run(make_model(itc_weight=0.0, itm_weight=0.0))
    with pytest.raises(ValueError, match="image_index"):
        model.match(TEXTS, images(), MASK)


def test_a_batch_of_one_image_trains_on_its_true_pairs():
    model = make_model()
    image_index = torch.zeros(3, dtype=torch.long)
    output = model(TEXTS[:3], images(1), MASK[:3], image_index=image_index, return_loss=True)
    labels = torch.ones(3, dtype=torch.long)
    assert_close(output.itm_loss, cross_entropy(output.itm_logits[:3], labels))
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("value, used", [(0.07, 0.07), (-1.0, 0.001), (3.0, 0.5)])
def test_temperature_is_clamped_when_it_is_used(value, used):
    model = make_model()
    with torch.no_grad():
        model.temp.weight.fill_(value)
    output = run(model)
    assert_close(output.logits_per_text, output.text_embeds @ output.image_embeds.T / used)
    output.itc_loss.backward()
    assert model.temp.weight.item() == pytest.approx(value)
    assert (model.temp.weight.grad.item() != 0) == (value == used)


def test_texts_are_taught_what_to_see_of_their_own_images():
    model = make_model(schedule="2:image:0.5,3:text:0.5").train()
    centers = torch.rand(len(TEXTS), 2)
    regions = torch.cat([centers, torch.full_like(centers, 0.5)], dim=-1)
    output = run(model, regions=regions)
    plain = run(model)
    targets = region_targets(regions, model.config.vision_config.grid_size)
    union = torch.stack([targets[IMAGE_INDEX == image].amax(dim=0) for image in IMAGE_INDEX])
    by_image, by_text = output.selection
    expected = selection_loss(by_image.scores, by_image.candidate_indices, union)
    expected = expected + selection_loss(by_text.scores, by_text.candidate_indices, targets)
    assert_close(output.selection_loss, expected.mean() / 2)
    assert_close(output.loss, plain.loss + 0.5 * output.selection_loss)
    assert plain.selection_loss is None
    assert run(model.eval(), regions=regions).selection_loss is None


# Image i has the logits log(SCORES[i]) over the texts. By row, the probabilities are 1/4, 1/2, 1/4; 1/2, 1/4, 1/4;
# 1/4, 1/4, 1/2. By column, 1/6, 4/6, 1/6; 2/5, 2/5, 1/5; 1/5, 2/5, 2/5.
SCORES = torch.tensor([[1.0, 2.0, 1.0], [4.0, 2.0, 2.0], [1.0, 1.0, 2.0]])


def ids(*values):
    return torch.tensor(values)


def loss_of(logits_per_image, image_ids, text_image_ids, temperature=1.0):
    """Return the loss of any logits. The images are unit vectors, so that each text is its column of logits."""
    images = torch.eye(len(logits_per_image))
    texts = logits_per_image.T * temperature
    return contrastive_loss(images, texts, temperature, image_ids, text_image_ids).item()


# The images of the three pairs, and the losses by image and by text: distinct images, then one that is there twice and
# shares its texts.
PAIRS = [
    ([3, 1, 2], [4, 4, 2], [6, 5 / 2, 5 / 2]),
    ([7, 7, 9], [2**1.5, 2**1.5, 2], [(6 * 6 / 4) ** 0.5, 5 / 2, 5 / 2]),
]


@pytest.mark.parametrize("image_ids, odds_by_image, odds_by_text", PAIRS, ids=["distinct", "twice"])
def test_the_contrastive_loss_by_hand(image_ids, odds_by_image, odds_by_text):
    losses = [math.log(odds) for odds in (*odds_by_image, *odds_by_text)]
    loss = loss_of(SCORES.log(), ids(*image_ids), ids(*image_ids), torch.tensor([0.5]))
    assert loss == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_similarity_is_computed_in_full_precision():
    queries, candidates = torch.nn.functional.normalize(torch.randn(2, 5, 64), dim=-1)
    expected = (queries.double() @ candidates.double().T / 0.01).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(similarity(queries, candidates, 0.01), expected, rtol=1e-4, atol=1e-4)
    assert similarity(queries.bfloat16(), candidates.bfloat16(), 0.01).dtype == torch.float32
    assert similarity(queries.double(), candidates.double(), 0.01).dtype == torch.float64


HALVES = [math.log(odds) for odds in (0.5, 0.25, 0.125, 0.125)]
# At a temperature of 0.001 logits are up to 2000 apart: these probabilities are 0 as floats.
FAR = [1000.0, -1000.0, -1000.0 + math.log(3)]


@pytest.mark.parametrize(
    "logits, same_image, expected",
    [(HALVES, 0, [0, 0.5, 0.25, 0.25]), (HALVES, 2, [4 / 7, 2 / 7, 0, 1 / 7]), (FAR, 0, [0, 0.25, 0.75])],
)
def test_negatives_are_drawn_by_the_softmax_of_the_others(logits, same_image, expected, num_draws=40_000):
    is_same_image = torch.arange(len(logits)) == same_image
    rows = torch.tensor(logits).expand(num_draws, -1)
    indices, valid = hard_negative_indices(rows, is_same_image.expand(num_draws, -1))
    assert valid.all()
    shares = indices.bincount(minlength=len(logits)) / num_draws
    assert shares[same_image] == 0
    # Four standard deviations of a share of one half.
    assert_close(shares, torch.tensor(expected), rtol=0, atol=0.01)


def test_a_query_without_a_negative_says_so():
    same_image = torch.tensor([[True, True, True], [True, False, True]])
    indices, valid = hard_negative_indices(torch.randn(2, 3), same_image)
    assert valid.tolist() == [False, True]
    assert 0 <= indices[0] < 3
    assert indices[1] == 1


def test_matching_pairs_are_true_ones_then_negative_images_then_negative_texts():
    # But for its own, text 0 fits image 2 best, text 1 image 2, text 2 image 1; image 0 text 1, 1 text 2, 2 text 0.
    logits = 100 * torch.tensor([[9.0, 0.0, 2.0], [1.0, 9.0, 1.5], [0.0, 1.0, 9.0]])
    pairs = matching_pairs(logits, torch.arange(3))
    assert pairs.text_index.tolist() == [0, 1, 2, 0, 1, 2, 1, 2, 0]
    assert pairs.image_index.tolist() == [0, 1, 2, 2, 2, 1, 0, 1, 2]
    assert pairs.labels.tolist() == [1] * 3 + [0] * 6
    assert pairs.weights.tolist() == [1.0] * 9


def test_pairs_of_the_same_image_are_never_negatives():
    image_ids = ids(3, 3, 1, 2, 1, 3)
    logits = 20.0 * (image_ids[:, None] == image_ids)  # excluded candidates have the highest logits by far
    for _ in range(500):
        pairs = matching_pairs(logits, image_ids)
        same_image = image_ids[pairs.text_index] == image_ids[pairs.image_index]
        assert torch.equal(same_image, pairs.labels == 1)
    assert pairs.weights.all()


def test_matching_loss_is_the_mean_over_the_pairs_that_count():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [0.0, math.log(3)], [9.0, -9.0]])
    labels = torch.tensor([1, 1, 0, 1])
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
    loss = matching_loss(logits, labels, weights)
    assert loss.item() == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(4)) / 3, rel=1e-6)
    rounded = logits.bfloat16()
    assert torch.equal(matching_loss(rounded, labels, weights), matching_loss(rounded.float(), labels, weights))
