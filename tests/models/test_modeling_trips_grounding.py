"""Visual grounding against its three parts, and box losses by hand and by torchvision, also of degenerate boxes."""

import math

import pytest
import torch
import torchvision
from tiny_models import BOXES, TEXTS, Case, kept_by

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
@pytest.mark.parametrize("as_cache", [False, True], ids=["pixels", "image_cache"])
def test_it_is_its_parts_for_one_text_at_a_time(as_cache):
    """Places are those of the image itself, of 4 x 16 patches here, not of the configured grid."""
    model = CASE.make_model()
    pixel_values = torch.randn(2, 3, 16, 64, generator=torch.Generator().manual_seed(3))
    given = {"image_cache": model.model.encode_images(pixel_values)} if as_cache else {"pixel_values": pixel_values}
    texts, mask, index = TEXTS[:4], (TEXTS[:4] != 0).long(), torch.tensor([1, 0, 1, 1])
    output = model(texts, attention_mask=mask, image_index=index, **given)
    assert (output.pred_boxes.shape, output.pred_boxes.dtype) == ((4, 4), torch.float32)
    for row in range(4):
        text = model.model.text_model(texts[row : row + 1, : int(mask[row].sum())]).last_hidden_state
        vision = model.model.vision_model(pixel_values[index[row]][None], text[:, 0])
        fused = model.model.fusion_model(text, vision.last_hidden_state).last_hidden_state
        kept = [*kept_by(vision)[-1][0], -1]  # -1: fused tokens, the last one new
        centers = [[0.5, 0.5] if i < 0 else [(i % 16 + 0.5) / 16, (i // 16 + 0.5) / 4] for i in kept]
        expected, _ = model.box_head(fused[:, 0], vision.last_hidden_state[:, 1:], torch.tensor([centers]))
        torch.testing.assert_close(output.pred_boxes[row], expected[0], rtol=1e-4, atol=1e-5)
        assert [rows[row] for rows in kept_by(output)] == [rows[0] for rows in kept_by(vision)]


def test_the_head_is_detrs_around_the_place_that_it_attends_to():
    head, state, tokens = CASE.make_model().box_head, torch.randn(WIDTH), torch.randn(3, IMAGE_WIDTH)
    centers = [[0.1, 0.9], [0.5, 0.5], [0.7, 0.3]]
    boxes, looks = head(state[None], tokens[None], torch.tensor([centers]))

    scores = torch.stack([head.query(state).dot(head.key(token)) / WIDTH**0.5 for token in tokens])
    torch.testing.assert_close(looks[0], scores.exp() / scores.exp().sum())
    weights = looks[0].tolist()
    assert max(weights) - min(weights) > 0.1
    x, y = (sum(weight * center[axis] for weight, center in zip(weights, centers)) for axis in (0, 1))
    states = state + sum(weight * head.value(token) for weight, token in zip(weights, tokens))
    offsets = head.layers[2](head.layers[1](head.layers[0](states).relu()).relu())
    logits = torch.tensor([math.log(x / (1 - x)), math.log(y / (1 - y)), 0, 0]) + offsets
    torch.testing.assert_close(boxes[0], 1 / (1 + (-logits).exp()), rtol=1e-4, atol=1e-5)
    assert [tuple(layer.weight.shape) for layer in head.layers] == [(WIDTH, WIDTH)] * 2 + [(4, WIDTH)]


def test_losses_by_hand():
    # The first box is right. The second, the left half of the image, should be the right half: the boxes touch.
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.25, 0.5, 0.5, 1.0]])
    labels = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.75, 0.5, 0.5, 1.0]])
    l1_loss, giou_loss = box_losses(boxes, labels)
    torch.testing.assert_close((l1_loss, giou_loss), (torch.tensor(0.5 / 2), torch.tensor(1.0 / 2)))
    l1_loss, giou_loss = box_losses(boxes, labels, num_items_in_batch=40)  # four numbers of each of ten boxes
    torch.testing.assert_close((l1_loss, giou_loss), (torch.tensor(0.5 / 10), torch.tensor(1.0 / 10)))


@torch.no_grad()
def test_autocast_does_not_round_places():
    """All tokens are at 0.7123, which bfloat16 would round to 0.7109."""
    head = CASE.make_model().box_head
    for layer in (head.query, head.key, head.layers[2]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    center = torch.tensor([0.7123, 0.3001])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        boxes, _ = head(torch.ones(1, WIDTH), torch.ones(1, 4, IMAGE_WIDTH), center.expand(1, 4, 2))
    torch.testing.assert_close(boxes, torch.tensor([[*center, 0.5, 0.5]]), rtol=0, atol=1e-5)


def test_bad_inputs_are_refused():
    model = CASE.make_model()
    for labels in (BOXES[:3], BOXES[:4, :3], BOXES[:1], BOXES[None, :4]):
        with pytest.raises(ValueError, match="labels"):
            model(**CASE.make_inputs(), labels=labels)


def random_boxes(count, seed):
    corners = torch.rand(count, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 100
    return torch.cat((corners.amin(1), corners.amax(1)), dim=1)


def test_iou_its_loss_and_gradients_are_torchvisions():
    boxes, targets = random_boxes(200, seed=1), random_boxes(200, seed=2)
    iou = torchvision.ops.box_iou(boxes, targets).diagonal()
    assert 50 < (iou == 0).sum() < 150  # both boxes that meet and boxes that do not
    torch.testing.assert_close(paired_box_iou(boxes, targets), iou)
    expected = torchvision.ops.generalized_box_iou_loss(boxes, targets)
    torch.testing.assert_close(generalized_box_iou_loss(boxes, targets), expected, rtol=1e-6, atol=1e-8)
    gradients = []
    for loss_function in (generalized_box_iou_loss, torchvision.ops.generalized_box_iou_loss):
        leaves = boxes.clone().requires_grad_(), targets.clone().requires_grad_()
        loss_function(*leaves).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("target", [(0.2, 0.2, 0.2, 0.2), (0.7, 0.2, 0.7, 0.2), (0.1, 0.1, 0.4, 0.3)], ids=str)
def test_a_box_without_area_gives_finite_values_and_gradients(target):
    box, target = torch.tensor([[0.2, 0.2, 0.2, 0.2]], requires_grad=True), torch.tensor([target])
    assert paired_box_iou(box, target).item() == 0
    loss = generalized_box_iou_loss(box, target)
    loss.sum().backward()
    assert 1 <= loss.item() <= 2
    assert box.grad.isfinite().all()


def test_the_attention_loss_by_hand():
    """The remaining tokens of a grid of 2 x 2 are patch 3, a fused token and patch 0."""
    right, top_right = [0.75, 0.5, 0.5, 1.0], [0.75, 0.25, 0.5, 0.5]
    looks, indices = torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([[3, -1, 0]])
    losses = attention_losses(looks.expand(2, 3), indices, torch.tensor([right, top_right]), (2, 2))
    # Patch 3 lies in the right half. No remaining patch lies in the top right, which was fused; the attention to the
    # fused token is ignored.
    assert losses.tolist() == pytest.approx([-math.log(0.2 / 0.7), 0.0])
    # Unpruned, all texts share a row of indices; attention 0.4 and 0.1 to the right half is pulled to 2 to 1.
    looks = torch.tensor([[0.3, 0.4, 0.2, 0.1]])
    loss = attention_losses(looks, torch.arange(4)[None], torch.tensor([right]), (2, 2))
    assert loss.item() == pytest.approx(2 / 3 * math.log(2 / 3 / 0.4) + 1 / 3 * math.log(1 / 3 / 0.1))
