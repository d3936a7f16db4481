"""Selection supervision: examples by hand, learning, and reduction over batches."""

import math

import pytest
import torch
from tiny_models import ANSWERS, BOXES, IMAGES, TEXTS, make_config

from modeling_trips import (
    TripsForImagesAndTextClassification,
    TripsForQuestionAnswering,
    TripsForVisualGrounding,
)
from modeling_trips.patch_selection import region_targets, selection_loss, targets_of_candidates, union_of_targets


def test_targets_of_a_region_by_hand():
    # The region is x from 0.25 to 0.75, y from 0 to 0.25, in a grid of 2 rows and 4 columns.
    targets = region_targets(torch.tensor([[0.5, 0.125, 0.5, 0.25], [0.3, 0.3, 0.0, 0.0]]), (2, 4))
    assert targets[0].tolist() == pytest.approx([0, 0.5, 0.5, 0, 0, 0, 0, 0])
    assert targets[1].tolist() == [0] * 8  # no region
    # A region across patches: the target is the share of each patch, here one and three quarters.
    across = region_targets(torch.tensor([[0.25 + 0.025, 0.25, 0.1, 0.1]]), (2, 4))
    assert across[0].tolist() == pytest.approx([0.25, 0.75, 0, 0, 0, 0, 0, 0])


def test_a_fused_token_counts_for_what_is_behind_it():
    targets = torch.tensor([[0.5, 0.25, 0.0, 0.25]])
    candidates = torch.tensor([[0, 2, -1]])  # patches 1 and 3 were fused: half of the region
    assert targets_of_candidates(targets, candidates).tolist() == [[0.5, 0.0, 0.5]]
    assert targets_of_candidates(targets * 0, candidates).tolist() == [[0.0, 0.0, 0.0]]


def test_the_loss_by_hand():
    scores = torch.tensor([[0.64, 0.16, 0.2]]).repeat(3, 1)
    candidates = torch.tensor([[0, 2, -1]]).repeat(3, 1)
    targets = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    # Two patches have equal targets and attention 4 to 1: the target is 2 to 1. The third text has no region.
    two = 2 / 3 * math.log(2 / 3 / 0.64) + 1 / 3 * math.log(1 / 3 / 0.16)
    losses = selection_loss(scores, candidates, targets)
    assert losses.tolist() == pytest.approx([two, -math.log(0.16), 0.0], abs=1e-6)


def test_the_target_is_no_way_for_the_gradient():
    """The target is constant, so that the gradient of the logits is the difference."""
    logits = torch.tensor([[0.3, -0.2, 0.9, 0.1]], requires_grad=True)
    wanted = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    scores = logits.softmax(dim=-1)
    selection_loss(scores, torch.arange(4)[None], wanted).sum().backward()
    target = (wanted * scores.sqrt()).detach()
    torch.testing.assert_close(logits.grad, scores.detach() - target / target.sum())


def make_model(model_class, **fields):
    torch.manual_seed(0)
    config = make_config(selection_layers=[1, 3], **fields)
    return model_class._from_config(config, attn_implementation="sdpa").train()


def batch(rows=slice(0, 4)):
    inputs = {"input_ids": TEXTS, "attention_mask": (TEXTS != 0).long(), "pixel_values": IMAGES[:, 0]}
    return {name: value[rows] for name, value in {**inputs, "labels": ANSWERS, "regions": BOXES}.items()}


def test_it_is_a_part_of_the_loss_in_training_alone():
    model = make_model(TripsForQuestionAnswering)
    with_regions = model(**batch())
    without = model(**{**batch(), "regions": None})
    assert without.selection_loss is None and with_regions.selection_loss > 0
    difference = (with_regions.loss - without.loss) / model.config.selection_loss_weight
    torch.testing.assert_close(difference, with_regions.selection_loss)
    assert model.eval()(**batch()).selection_loss is None
    model.train().config.selection_loss_weight = 0
    assert model(**batch()).selection_loss is None


def test_random_layers_have_no_loss():
    assert make_model(TripsForQuestionAnswering, selection_guidance="random")(**batch()).selection_loss is None
    outputs = make_model(TripsForQuestionAnswering, selection_guidance=["random", "text"])(**batch())
    scores, candidates = outputs.selection[1].scores, outputs.selection[1].candidate_indices
    expected = selection_loss(scores, candidates, region_targets(BOXES[:4], (8, 8)))
    num_tokens = (ANSWERS[:4] != -100).sum(dim=1)
    torch.testing.assert_close(outputs.selection_loss, (expected * num_tokens).sum() / num_tokens.sum())


def test_the_union_of_the_targets_of_an_image_by_hand():
    """Texts 0, 1 and 3 belong to image 1, text 2 to image 0. Text 3 has no target. Image 2 has no text."""
    targets = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    union = union_of_targets(targets, torch.tensor([1, 1, 0, 1]), num_images=3)
    assert union.tolist() == [[0.5, 0.5, 0.75], [0.5, 0.5, 0.75], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_the_image_is_supervised_by_all_regions_of_its_texts():
    """The targets of two texts are the left and right half: the layer scored by the image should keep both."""
    halves = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]])
    model = make_model(TripsForQuestionAnswering, selection_guidance=["image", "text"])
    shared = {"pixel_values": IMAGES[:1, 0], "image_index": torch.tensor([0, 0]), "regions": halves}
    outputs = model.model(TEXTS[:2], attention_mask=(TEXTS[:2] != 0).long(), **shared)
    by_image, by_text = outputs.selection
    everywhere = torch.full((2, 64), 1 / 64)
    expected = selection_loss(by_image.scores, by_image.candidate_indices, everywhere)
    expected += selection_loss(by_text.scores, by_text.candidate_indices, region_targets(halves, (8, 8)))
    torch.testing.assert_close(outputs.selection_losses, expected / 2)


def test_a_cached_image_is_supervised_too():
    fields = {"selection_guidance": ["image", "text"], "patch_embedding_type": "linear"}
    model = make_model(TripsForQuestionAnswering, **fields)
    texts = {"input_ids": TEXTS[:4], "attention_mask": (TEXTS[:4] != 0).long(), "regions": BOXES[:4]}
    index = torch.tensor([0, 0, 1, 2])
    direct = model.model(pixel_values=IMAGES[:3, 0], image_index=index, **texts)
    image_cache = model.model.encode_images(IMAGES[:3, 0])
    cached = model.model(image_cache=image_cache, image_index=index, **texts)
    torch.testing.assert_close(direct.selection_losses, cached.selection_losses)


@pytest.mark.parametrize("fields", [{}, {"selection_guidance": "image"}, {"fusion_type": "single_stream"}], ids=str)
def test_selection_learns_to_keep_the_regions(fields):
    """Attention moves into the region. The gradient through the fused token alone does little."""
    model, inside = make_model(TripsForQuestionAnswering, **fields), region_targets(BOXES[:4], (8, 8)) > 0
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attention = []
    for _ in range(60):
        outputs = model(**batch())
        attention.append((outputs.selection[0].scores * inside).sum(dim=1).mean().item())
        optimizer.zero_grad()
        outputs.selection_loss.backward()
        optimizer.step()
    assert attention[0] < 0.4 and attention[-1] > 0.9


def test_parts_of_a_batch_add_up_to_its_loss():
    model = make_model(TripsForQuestionAnswering, patch_embedding_type="linear")
    num_items = (ANSWERS[:4] != -100).sum()
    whole = model(**batch()).loss
    parts = [model(**batch(rows), num_items_in_batch=num_items).loss for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), whole)


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


def test_targets_teach_the_texts_that_have_no_region():
    model = make_model(TripsForQuestionAnswering)
    targets = torch.rand(4, 64).softmax(dim=-1)
    some = BOXES[:4].clone()
    some[1:3, 2:] = 0  # texts 1 and 2 have no region
    losses = {
        name: model.model(
            TEXTS[:4], IMAGES[:4, 0], (TEXTS[:4] != 0).long(), regions=regions, patch_targets=given
        ).selection_losses
        for name, regions, given in (
            ("regions", BOXES[:4], None),
            ("targets", None, targets),
            ("some", some, None),
            ("both", some, targets),
        )
    }
    torch.testing.assert_close(losses["both"][[0, 3]], losses["regions"][[0, 3]])
    torch.testing.assert_close(losses["both"][1:3], losses["targets"][1:3])
    assert losses["some"][1:3].tolist() == [0, 0] and (losses["targets"] > 0).all()


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
    supervised = model(**inputs, labels=labels, patch_targets=targets)
    torch.testing.assert_close(supervised.selection_loss, outputs.selection_loss)
    assert plain.selection_loss is None
