"""Visual grounding against its three parts, and box losses by hand and by torchvision, also of degenerate boxes."""

import math

import pytest
import torch
import torchvision
from tiny_models import BOXES, TEXTS, Case, kept_by
from torch.testing import assert_close

from modeling_trips.modeling_trips_grounding import (
    TripsForVisualGrounding,
    attention_losses,
    box_losses,
    generalized_box_iou_loss,
    paired_box_iou,
)


CASE = Case(TripsForVisualGrounding)
WIDTH, IMAGE_WIDTH = 48, 32


@torch.no_grad()
def test_it_is_its_parts_for_one_text_at_a_time():
    """Places are those of the image itself, of 4 x 16 patches here, not of the configured grid."""
    model = CASE.make_model()
    pixel_values = torch.randn(2, 3, 16, 64, generator=torch.Generator().manual_seed(3))
    texts = TEXTS[:4]
    mask = (texts != 0).long()
    image_index = torch.tensor([1, 0, 1, 1])
    output = model(texts, attention_mask=mask, image_index=image_index, pixel_values=pixel_values)
    assert output.pred_boxes.shape == (4, 4)
    assert output.pred_boxes.dtype == torch.float32
    for row, image in enumerate(image_index.tolist()):
        length = int(mask[row].sum())
        text = model.model.text_model(texts[row : row + 1, :length]).last_hidden_state
        vision = model.model.vision_model(pixel_values[image][None], text[:, 0])
        fused = model.model.fusion_model(text, vision.last_hidden_state).last_hidden_state
        kept = kept_by(vision)[-1][0]
        centers = [[(i % 16 + 0.5) / 16, (i // 16 + 0.5) / 4] if i >= 0 else [0.5, 0.5] for i in kept]
        centers.append([0.5, 0.5])  # the new fused token
        expected, _ = model.box_head(fused[:, 0], vision.last_hidden_state[:, 1:], torch.tensor([centers]))
        assert_close(output.pred_boxes[row], expected[0], rtol=1e-4, atol=1e-5)
        assert [rows[row] for rows in kept_by(output)] == [rows[0] for rows in kept_by(vision)]


def test_the_head_is_detrs_around_the_place_that_it_attends_to():
    head = CASE.make_model().box_head
    state = torch.randn(WIDTH)
    tokens = torch.randn(3, IMAGE_WIDTH)
    centers = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.7, 0.3]])
    boxes, attention = head(state[None], tokens[None], centers[None])

    scores = torch.stack([head.query(state).dot(head.key(token)) / WIDTH**0.5 for token in tokens])
    weights = scores.exp() / scores.exp().sum()
    assert_close(attention[0], weights)
    assert weights.max() - weights.min() > 0.1
    place = sum(weight * center for weight, center in zip(weights, centers))
    state = state + sum(weight * head.value(token) for weight, token in zip(weights, tokens))
    first, second, last = head.layers
    offsets = last(second(first(state).relu()).relu())
    logits = torch.cat([(place / (1 - place)).log(), torch.zeros(2)]) + offsets
    assert_close(boxes[0], 1 / (1 + (-logits).exp()), rtol=1e-4, atol=1e-5)


def test_losses_by_hand():
    # The first box is right. The second, the left half of the image, should be the right half: the boxes touch.
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.25, 0.5, 0.5, 1.0]])
    labels = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.75, 0.5, 0.5, 1.0]])
    l1_loss, giou_loss = box_losses(boxes, labels)
    assert l1_loss.item() == pytest.approx(0.5 / 2)
    assert giou_loss.item() == pytest.approx(1.0 / 2)
    l1_loss, giou_loss = box_losses(boxes, labels, num_items_in_batch=40)  # four numbers of each of ten boxes
    assert l1_loss.item() == pytest.approx(0.5 / 10)
    assert giou_loss.item() == pytest.approx(1.0 / 10)


@torch.no_grad()
def test_autocast_does_not_round_places():
    """All tokens are at 0.7123, which bfloat16 would round to 0.7109."""
    head = CASE.make_model().box_head
    for layer in (head.query, head.key, head.layers[2]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    state = torch.ones(1, WIDTH)
    tokens = torch.ones(1, 4, IMAGE_WIDTH)
    centers = torch.tensor([0.7123, 0.3001]).expand(1, 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        boxes, _ = head(state, tokens, centers)
    assert_close(boxes, torch.tensor([[0.7123, 0.3001, 0.5, 0.5]]), rtol=0, atol=1e-5)


def test_bad_inputs_are_refused():
    model = CASE.make_model()
    for labels in (BOXES[:3], BOXES[:4, :3], BOXES[:1], BOXES[None, :4]):
        with pytest.raises(ValueError, match="labels"):
            model(**CASE.make_inputs(), labels=labels)


def random_boxes(seed):
    generator = torch.Generator().manual_seed(seed)
    corners = 100 * torch.rand(200, 2, 2, dtype=torch.float64, generator=generator)
    return torch.cat((corners.amin(1), corners.amax(1)), dim=1)


def test_iou_its_loss_and_gradients_are_torchvisions():
    boxes = random_boxes(seed=1).requires_grad_()
    targets = random_boxes(seed=2).requires_grad_()
    iou = torchvision.ops.box_iou(boxes, targets).diagonal()
    assert 50 < (iou == 0).sum() < 150  # both boxes that meet and boxes that do not
    assert_close(paired_box_iou(boxes, targets), iou)
    loss = generalized_box_iou_loss(boxes, targets)
    expected = torchvision.ops.generalized_box_iou_loss(boxes, targets)
    assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    gradients = torch.autograd.grad(loss.sum(), (boxes, targets))
    expected_gradients = torch.autograd.grad(expected.sum(), (boxes, targets))
    assert_close(gradients, expected_gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("target", [(0.2, 0.2, 0.2, 0.2), (0.7, 0.2, 0.7, 0.2), (0.1, 0.1, 0.4, 0.3)], ids=str)
def test_a_box_without_area_gives_finite_values_and_gradients(target):
    box = torch.tensor([[0.2, 0.2, 0.2, 0.2]], requires_grad=True)
    target = torch.tensor([target])
    assert paired_box_iou(box, target).item() == 0
    loss = generalized_box_iou_loss(box, target)
    loss.sum().backward()
    assert 1 <= loss.item() <= 2
    assert box.grad.isfinite().all()


def test_the_attention_loss_by_hand():
    right = [0.75, 0.5, 0.5, 1.0]
    top_right = [0.75, 0.25, 0.5, 0.5]
    # The remaining tokens of a grid of 2 x 2 are patch 3, a fused token and patch 0. Patch 3 lies in the right half.
    # No remaining patch lies in the top right, which was fused; the attention to the fused token is ignored.
    attention = torch.tensor([[0.2, 0.3, 0.5]]).repeat(2, 1)
    indices = torch.tensor([[3, -1, 0]])
    losses = attention_losses(attention, indices, torch.tensor([right, top_right]), (2, 2))
    assert losses.tolist() == pytest.approx([-math.log(0.2 / 0.7), 0.0])
    # Unpruned, all texts share a row of indices; attention 0.4 and 0.1 to the right half is pulled to 2 to 1.
    attention = torch.tensor([[0.3, 0.4, 0.2, 0.1]])
    loss = attention_losses(attention, torch.arange(4)[None], torch.tensor([right]), (2, 2))
    assert loss.item() == pytest.approx(2 / 3 * math.log(2 / 3 / 0.4) + 1 / 3 * math.log(1 / 3 / 0.1))
