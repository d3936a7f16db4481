"""Retrieval: features for indexing, matching against the model on each pair, and both losses."""

import pytest
import torch
from tiny_retrieval import (
    IMAGE_IDS,
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
    pairs_of,
    run,
)
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel
from two_processes import results_of

from modeling_trips.modeling_trips_pretraining import matching_pairs
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
    assert output.itc_loss is output.image_embeds is output.logits_per_text is None
    assert torch.equal(output.loss, output.itm_loss)
    assert calls_of(model.model.vision_model.layers[-1], lambda: run(model)) == [18]
    torch.manual_seed(0)
    pairs = matching_pairs(torch.zeros(6, 6), PAIR_IDS)  # all as likely
    expected = model.match(
        TEXTS, images(), MASK, text_index=pairs.text_index, image_index=IMAGE_INDEX[pairs.image_index]
    )
    torch.testing.assert_close(output.itm_logits, expected.itm_logits)


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


def loss_and_gradients(model, inputs):
    torch.manual_seed(0)
    loss = model(**inputs).loss
    loss.backward()
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return {"loss": loss.detach(), "gradients": gradients(model)}


def make_matching_batch():
    """
    Return two groups of two nearly equal pairs. At the lowest temperature the hardest negative of each pair is the
    other one of its group, for any noise.
    """
    generator = torch.Generator().manual_seed(201)
    pixel_values = torch.randn(2, 1, 3, 16, 16, generator=generator) + 0.02 * torch.randn(
        2, 2, 3, 16, 16, generator=generator
    )
    texts = torch.tensor([[1, 5, 7, 9, 2], [1, 5, 7, 9, 4], [1, 8, 3, 3, 2], [1, 8, 3, 3, 6]])
    return {"input_ids": texts, "pixel_values": pixel_values.flatten(0, 1).double(), "image_ids": torch.arange(4)}


def make_matching_model():
    """Return a model in double precision, since the temperature multiplies rounding errors by a thousand."""
    model = make_model().double()
    with torch.no_grad():
        model.temp.weight.fill_(0.001)
    return model


def run_process(rank):
    torch.set_num_threads(1)
    half = {name: tensor.chunk(2)[rank] for name, tensor in make_matching_batch().items()}
    return loss_and_gradients(DistributedDataParallel(make_matching_model()), half)


@pytest.mark.slow
def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path):
    outputs = results_of(run_process, tmp_path)
    expected = loss_and_gradients(make_matching_model(), make_matching_batch())
    torch.testing.assert_close((outputs[0]["loss"] + outputs[1]["loss"]) / 2, expected["loss"])
    for output in outputs:
        torch.testing.assert_close(output["gradients"], expected["gradients"], rtol=1e-4, atol=1e-5)


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
