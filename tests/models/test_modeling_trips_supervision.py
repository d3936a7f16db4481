"""Selection and attention supervision of the heads: parts of the loss, learning, and reduction over batches."""

import pytest
import torch
from tiny_models import ANSWERS, BOXES, IMAGES, TEXTS, make_config

from modeling_trips import (
    TripsForImagesAndTextClassification,
    TripsForQuestionAnswering,
    TripsForVisualGrounding,
)
from modeling_trips.patch_selection import region_targets, selection_loss


def make_model(model_class=TripsForQuestionAnswering, coefficient=0.0, attn_implementation="sdpa", **fields):
    """Return a model in training mode; `coefficient` is the weight of the attention loss."""
    torch.manual_seed(0)
    config = make_config(**fields)
    config.attention_loss_weight = coefficient
    return model_class._from_config(config, attn_implementation=attn_implementation).train()


def batch(rows=slice(0, 4)):
    inputs = {"input_ids": TEXTS, "attention_mask": (TEXTS != 0).long(), "pixel_values": IMAGES[:, 0]}
    return {name: value[rows] for name, value in {**inputs, "labels": ANSWERS, "regions": BOXES}.items()}


def test_it_is_a_part_of_the_loss_in_training_alone():
    model = make_model()
    with_regions = model(**batch())
    without = model(**{**batch(), "regions": None})
    assert without.selection_loss is None and with_regions.selection_loss > 0
    difference = (with_regions.loss - without.loss) / model.config.selection_loss_weight
    torch.testing.assert_close(difference, with_regions.selection_loss)
    assert model.eval()(**batch()).selection_loss is None
    model.train().config.selection_loss_weight = 0
    assert model(**batch()).selection_loss is None


def test_random_layers_have_no_loss():
    assert make_model(selection_guidance="random")(**batch()).selection_loss is None
    outputs = make_model(selection_guidance=["random", "text"])(**batch())
    scores, candidates = outputs.selection[1].scores, outputs.selection[1].candidate_indices
    expected = selection_loss(scores, candidates, region_targets(BOXES[:4], (8, 8)))
    num_tokens = (ANSWERS[:4] != -100).sum(dim=1)
    torch.testing.assert_close(outputs.selection_loss, (expected * num_tokens).sum() / num_tokens.sum())


def test_the_image_is_supervised_by_all_regions_of_its_texts():
    """The targets of two texts are the left and right half: the layer scored by the image should keep both."""
    halves = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]])
    model = make_model(selection_guidance=["image", "text"])
    shared = {"pixel_values": IMAGES[:1, 0], "image_index": torch.tensor([0, 0]), "regions": halves}
    outputs = model.model(TEXTS[:2], attention_mask=(TEXTS[:2] != 0).long(), **shared)
    by_image, by_text = outputs.selection
    everywhere = torch.full((2, 64), 1 / 64)
    expected = selection_loss(by_image.scores, by_image.candidate_indices, everywhere)
    expected += selection_loss(by_text.scores, by_text.candidate_indices, region_targets(halves, (8, 8)))
    torch.testing.assert_close(outputs.selection_losses, expected / 2)


def test_a_cached_image_is_supervised_too():
    fields = {"selection_guidance": ["image", "text"], "patch_embedding_type": "linear"}
    model = make_model(**fields)
    texts = {"input_ids": TEXTS[:4], "attention_mask": (TEXTS[:4] != 0).long(), "regions": BOXES[:4]}
    index = torch.tensor([0, 0, 1, 2])
    direct = model.model(pixel_values=IMAGES[:3, 0], image_index=index, **texts)
    image_cache = model.model.encode_images(IMAGES[:3, 0])
    cached = model.model(image_cache=image_cache, image_index=index, **texts)
    torch.testing.assert_close(direct.selection_losses, cached.selection_losses)


@pytest.mark.parametrize("fusion_type", ["cross_attention", "single_stream"])
def test_texts_learn_to_keep_their_regions(fusion_type):
    """Attention moves into the region. The gradient through the fused token alone does little."""
    model, inside = make_model(fusion_type=fusion_type), region_targets(BOXES[:4], (8, 8)) > 0
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attention = []
    for _ in range(60):
        outputs = model(**batch())
        attention.append((outputs.selection[0].scores * inside).sum(dim=1).mean().item())
        optimizer.zero_grad()
        outputs.selection_loss.backward()
        optimizer.step()
    assert attention[0] < 0.4 and attention[-1] > 0.9


def test_the_box_to_be_found_is_the_region():
    model = make_model(TripsForVisualGrounding)
    inputs = {**batch(), "labels": BOXES[:4]}
    del inputs["regions"]
    outputs = model(**inputs)
    targets = region_targets(BOXES[:4], (8, 8))
    by_layer = [selection_loss(layer.scores, layer.candidate_indices, targets) for layer in outputs.selection]
    torch.testing.assert_close(outputs.selection_loss, torch.stack(by_layer).mean())
    losses = 5 * outputs.l1_loss + 2 * outputs.giou_loss + 0.5 * outputs.selection_loss
    torch.testing.assert_close(outputs.loss, losses)
    parts = [
        model(**{name: value[rows] for name, value in inputs.items()}, num_items_in_batch=4 * 4).selection_loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert sum(parts) > 0 and model.eval()(**inputs).selection_loss is None


def test_a_statement_is_taught_in_each_of_its_images():
    model = make_model(TripsForImagesAndTextClassification)
    regions, labels = BOXES.view(3, 2, 4), torch.tensor([0, 1, -100])
    inputs = {"input_ids": TEXTS[:3], "attention_mask": (TEXTS[:3] != 0).long(), "pixel_values": IMAGES[:3]}
    outputs = model(**inputs, labels=labels, regions=regions)
    targets = region_targets(regions.flatten(0, 1), (8, 8))
    losses = [selection_loss(layer.scores, layer.candidate_indices, targets) for layer in outputs.selection]
    by_text = torch.stack(losses).mean(dim=0).view(3, 2).mean(dim=1)
    torch.testing.assert_close(outputs.selection_loss, by_text[:2].mean())  # the third has no label
    plain = model(**inputs, labels=labels)
    torch.testing.assert_close(outputs.loss, plain.loss + 0.5 * outputs.selection_loss)
    assert plain.selection_loss is None


@pytest.mark.parametrize("keep_rate", [0.5, 1.0])
def test_attention_loss_is_a_part_of_the_loss_in_training_alone(keep_rate):
    inputs = batch()
    inputs["labels"] = inputs.pop("regions")
    models = (make_model(TripsForVisualGrounding, weight, keep_rate=keep_rate) for weight in (2.0, 0.0))
    supervised, unsupervised = models
    outputs, without = supervised(**inputs), unsupervised(**inputs)
    assert without.attention_loss is None and outputs.attention_loss > 0
    torch.testing.assert_close(outputs.loss - without.loss, 2 * outputs.attention_loss)
    assert supervised.eval()(**inputs).attention_loss is None


def test_questions_apart_and_together_have_the_same_loss():
    """Each question has the weight of its label tokens."""
    model, num_tokens = make_model(patch_embedding_type="linear"), int((ANSWERS[:4] != -100).sum())
    rows = (slice(row, row + 1) for row in range(4))
    parts = [model(**batch(row), num_items_in_batch=num_tokens).loss for row in rows]
    torch.testing.assert_close(sum(parts), model(**batch()).loss)
