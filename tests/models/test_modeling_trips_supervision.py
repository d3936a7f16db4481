"""Selection and attention supervision of the heads: parts of the loss, learning, and reduction over batches."""

import pytest
import torch
from tiny_models import ANSWERS, BOXES, IMAGES, TEXTS, make_config
from torch.testing import assert_close

from modeling_trips import (
    TripsForImagesAndTextClassification,
    TripsForQuestionAnswering,
    TripsForVisualGrounding,
)
from modeling_trips.patch_selection import region_targets, selection_loss


MASK = (TEXTS != 0).long()


def make_model(model_class=TripsForQuestionAnswering, attention_loss_weight=0.0, **fields):
    """Return a model in training mode."""
    torch.manual_seed(0)
    config = make_config(**fields)
    config.attention_loss_weight = attention_loss_weight
    return model_class(config).train()


def batch(rows=slice(0, 4)):
    return {
        "input_ids": TEXTS[rows],
        "attention_mask": MASK[rows],
        "pixel_values": IMAGES[rows, 0],
        "labels": ANSWERS[rows],
        "regions": BOXES[rows],
    }


def boxes_to_be_found(rows=slice(0, 4)):
    """Return a batch of visual grounding, whose labels are the regions."""
    inputs = batch(rows)
    inputs["labels"] = inputs.pop("regions")
    return inputs


def test_it_is_a_part_of_the_loss_in_training_alone():
    model = make_model()
    with_regions = model(**batch())
    without = model(**{**batch(), "regions": None})
    assert without.selection_loss is None
    assert with_regions.selection_loss > 0
    difference = (with_regions.loss - without.loss) / model.config.selection_loss_weight
    assert_close(difference, with_regions.selection_loss)
    assert model.eval()(**batch()).selection_loss is None
    model.train().config.selection_loss_weight = 0
    assert model(**batch()).selection_loss is None


def test_random_layers_have_no_loss():
    assert make_model(schedule="1:random:0.6,3:random:0.6")(**batch()).selection_loss is None
    outputs = make_model(schedule="1:random:0.6,3:text:0.6")(**batch())
    last = outputs.selection[1]
    expected = selection_loss(last.scores, last.candidate_indices, region_targets(BOXES[:4], (8, 8)))
    num_tokens = (ANSWERS[:4] != -100).sum(dim=1)
    assert_close(outputs.selection_loss, (expected * num_tokens).sum() / num_tokens.sum())


def test_the_image_is_supervised_by_all_regions_of_its_texts():
    """The targets of two texts are the left and right half: the layer scored by the image should keep both."""
    halves = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]])
    model = make_model(schedule="1:image:0.6,3:text:0.6")
    outputs = model.model(
        input_ids=TEXTS[:2],
        attention_mask=MASK[:2],
        pixel_values=IMAGES[:1, 0],
        image_index=torch.tensor([0, 0]),
        regions=halves,
    )
    by_image, by_text = outputs.selection
    everywhere = torch.full((2, 64), 1 / 64)
    expected = selection_loss(by_image.scores, by_image.candidate_indices, everywhere)
    expected += selection_loss(by_text.scores, by_text.candidate_indices, region_targets(halves, (8, 8)))
    assert_close(outputs.selection_losses, expected / 2)


def test_a_cached_image_is_supervised_too():
    model = make_model(schedule="1:image:0.6,3:text:0.6", patch_embedding_type="linear").model
    pixel_values = IMAGES[:3, 0]
    texts = {
        "input_ids": TEXTS[:4],
        "attention_mask": MASK[:4],
        "regions": BOXES[:4],
        "image_index": torch.tensor([0, 0, 1, 2]),
    }
    direct = model(pixel_values=pixel_values, **texts)
    cached = model(image_cache=model.encode_images(pixel_values), **texts)
    assert_close(direct.selection_losses, cached.selection_losses)


@pytest.mark.parametrize("fusion_type", ["cross_attention", "single_stream"])
def test_texts_learn_to_keep_their_regions(fusion_type):
    """Attention moves into the region. The gradient through the fused token alone does little."""
    model = make_model(fusion_type=fusion_type)
    is_inside = region_targets(BOXES[:4], (8, 8)) > 0
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attention = []
    for _ in range(60):
        outputs = model(**batch())
        attention.append((outputs.selection[0].scores * is_inside).sum(dim=1).mean().item())
        optimizer.zero_grad()
        outputs.selection_loss.backward()
        optimizer.step()
    assert attention[0] < 0.4
    assert attention[-1] > 0.9


def test_the_box_to_be_found_is_the_region():
    model = make_model(TripsForVisualGrounding, patch_embedding_type="linear")
    outputs = model(**boxes_to_be_found())
    targets = region_targets(BOXES[:4], (8, 8))
    by_layer = [selection_loss(layer.scores, layer.candidate_indices, targets) for layer in outputs.selection]
    assert_close(outputs.selection_loss, torch.stack(by_layer).mean())
    losses = 5 * outputs.l1_loss + 2 * outputs.giou_loss + 0.5 * outputs.selection_loss
    assert_close(outputs.loss, losses)
    first = model(**boxes_to_be_found(slice(0, 1)), num_items_in_batch=4 * 4)
    rest = model(**boxes_to_be_found(slice(1, 4)), num_items_in_batch=4 * 4)
    assert_close(first.selection_loss + rest.selection_loss, outputs.selection_loss)
    assert model.eval()(**boxes_to_be_found()).selection_loss is None


def test_a_statement_is_taught_in_each_of_its_images():
    model = make_model(TripsForImagesAndTextClassification)
    regions = BOXES.view(3, 2, 4)
    inputs = {
        "input_ids": TEXTS[:3],
        "attention_mask": MASK[:3],
        "pixel_values": IMAGES[:3],
        "labels": torch.tensor([0, 1, -100]),
    }
    outputs = model(**inputs, regions=regions)
    targets = region_targets(regions.flatten(0, 1), (8, 8))
    by_layer = [selection_loss(layer.scores, layer.candidate_indices, targets) for layer in outputs.selection]
    by_text = torch.stack(by_layer).mean(dim=0).view(3, 2).mean(dim=1)
    assert_close(outputs.selection_loss, by_text[:2].mean())  # the third has no label
    plain = model(**inputs)
    assert_close(outputs.loss, plain.loss + 0.5 * outputs.selection_loss)
    assert plain.selection_loss is None


@pytest.mark.parametrize("schedule", ["1:text:0.5,3:text:0.5", "unpruned"])
def test_attention_loss_is_a_part_of_the_loss_in_training_alone(schedule):
    inputs = boxes_to_be_found()
    model = make_model(TripsForVisualGrounding, attention_loss_weight=2.0, schedule=schedule)
    outputs = model(**inputs)
    assert outputs.attention_loss > 0
    assert model.eval()(**inputs).attention_loss is None
    without = make_model(TripsForVisualGrounding, schedule=schedule)(**inputs)
    assert without.attention_loss is None
    assert_close(outputs.loss - without.loss, 2 * outputs.attention_loss)


def test_questions_apart_and_together_have_the_same_loss():
    """Each question has the weight of its label tokens."""
    model = make_model(patch_embedding_type="linear")
    num_tokens = int((ANSWERS[:4] != -100).sum())
    losses = [model(**batch(slice(row, row + 1)), num_items_in_batch=num_tokens).loss for row in range(4)]
    assert_close(sum(losses), model(**batch()).loss)
