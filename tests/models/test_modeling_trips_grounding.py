"""Visual grounding against its three parts, and box losses by hand and by torchvision, also of degenerate boxes."""

import math

import pytest
import torch
import torchvision
from tiny_models import kept_by, make_config

from modeling_trips.modeling_trips_grounding import (
    TripsForVisualGrounding,
    box_losses,
    generalized_box_iou_loss,
    paired_box_iou,
    token_centers,
    token_indices,
)
from modeling_trips.modeling_trips_vision import TripsSelection


TEXTS = torch.tensor([[1, 5, 7, 9, 2], [1, 8, 2, 0, 0], [1, 4, 6, 2, 0], [1, 9, 9, 2, 0]])
MASK = (TEXTS != 0).long()
IMAGE_INDEX = torch.tensor([1, 0, 1, 1])
BOXES = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 0.25], [0.5, 0.125, 0.5, 0.25], [0.9, 0.9, 0.1, 0.05]])
WIDTH, IMAGE_WIDTH = 48, 32


def make_model(**vision):
    torch.manual_seed(0)
    return TripsForVisualGrounding(make_config(**vision)).eval()


def images(count=2):
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))[:count]


def inputs():
    """Four texts about two images."""
    return {"input_ids": TEXTS, "attention_mask": MASK, "pixel_values": images(), "image_index": IMAGE_INDEX}


def corners(boxes):
    return torchvision.ops.box_convert(boxes, "cxcywh", "xyxy")


@torch.no_grad()
@pytest.mark.parametrize("guidance", ["text", "image"])
def test_it_is_its_parts_for_one_text_at_a_time(guidance):
    model = make_model(selection_guidance=guidance)
    output = model(**inputs())
    assert (output.pred_boxes.shape, output.pred_boxes.dtype) == ((4, 4), torch.float32)
    for row in range(4):
        text = model.model.text_model(TEXTS[row : row + 1, : int(MASK[row].sum())]).last_hidden_state
        vision = model.model.vision_model(images()[IMAGE_INDEX[row]][None], text[:, 0])
        fused = model.model.fusion_model(text, vision.last_hidden_state).last_hidden_state
        kept = [*kept_by(vision)[-1][0], -1]  # -1: fused tokens, the last one new
        centers = [[0.5, 0.5] if i < 0 else [(i % 8 + 0.5) / 8, (i // 8 + 0.5) / 8] for i in kept]
        centers = torch.tensor([centers])
        expected, _ = model.box_head(fused[:, 0], vision.last_hidden_state[:, 1:], centers)
        torch.testing.assert_close(output.pred_boxes[row], expected[0], rtol=1e-4, atol=1e-5)
        assert [rows[row] for rows in kept_by(output)] == [rows[0] for rows in kept_by(vision)]


def test_the_head_is_detrs_around_the_place_that_it_attends_to():
    head, state, tokens = make_model().box_head, torch.randn(WIDTH), torch.randn(3, IMAGE_WIDTH)
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


def test_centers_of_what_two_layers_kept_by_hand():
    """In a grid of 2 x 4, the kept patches are at the bottom left and right of the top middle."""
    selection = (None, TripsSelection(kept_indices=torch.tensor([[4, -1, 2]])))
    image_states = torch.zeros(1, 4, IMAGE_WIDTH)
    indices = token_indices(selection, image_states)
    assert indices.tolist() == [[4, -1, 2, -1]]
    expected = torch.tensor([[[0.125, 0.75], [0.5, 0.5], [0.625, 0.25], [0.5, 0.5]]])
    torch.testing.assert_close(token_centers(indices, grid_size=(2, 4)), expected)
    torch.testing.assert_close(
        token_centers(token_indices((), image_states), grid_size=(4, 1)),
        torch.tensor([[[0.5, 0.125], [0.5, 0.375], [0.5, 0.625], [0.5, 0.875]]]),
    )


@torch.no_grad()
def test_places_are_those_of_the_image_itself_not_of_the_configured_grid():
    model = make_model()
    pixel_values = torch.randn(2, 3, 16, 64, generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": TEXTS, "attention_mask": MASK, "image_index": IMAGE_INDEX}
    seen = []
    model.box_head.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    for images_of_any_form in (
        {"pixel_values": pixel_values},
        {"image_cache": model.model.encode_images(pixel_values)},
    ):
        output = model(**batch, **images_of_any_form)
        kept = output.selection[-1].kept_indices
        rows, columns = kept // 16, kept % 16
        torch.testing.assert_close(seen[-1][:, :-1, 0].where(kept >= 0, 0), ((columns + 0.5) / 16).where(kept >= 0, 0))
        torch.testing.assert_close(seen[-1][:, :-1, 1].where(kept >= 0, 0), ((rows + 0.5) / 4).where(kept >= 0, 0))


def test_losses_by_hand():
    # The first box is right. The second, the left half of the image, should be the right half: the boxes touch.
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.25, 0.5, 0.5, 1.0]])
    labels = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.75, 0.5, 0.5, 1.0]])
    l1_loss, giou_loss = box_losses(boxes, labels)
    torch.testing.assert_close((l1_loss, giou_loss), (torch.tensor(0.5 / 2), torch.tensor(1.0 / 2)))
    l1_loss, giou_loss = box_losses(boxes, labels, num_items_in_batch=40)  # four numbers of each of ten boxes
    torch.testing.assert_close((l1_loss, giou_loss), (torch.tensor(0.5 / 10), torch.tensor(1.0 / 10)))


def test_loss_is_the_weighted_sum_of_both():
    model = make_model()
    output = model(**inputs(), labels=BOXES)
    l1_loss = (output.pred_boxes - BOXES).abs().sum() / 4
    giou_loss = torchvision.ops.generalized_box_iou_loss(corners(output.pred_boxes), corners(BOXES), "mean")
    torch.testing.assert_close(output.l1_loss, l1_loss)
    torch.testing.assert_close(output.giou_loss, giou_loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(output.loss, 5 * l1_loss + 2 * giou_loss, rtol=1e-4, atol=0)
    assert not {"loss", "l1_loss", "giou_loss"} & model(**inputs()).keys()


@torch.no_grad()
def test_autocast_does_not_round_places():
    """All tokens are at 0.7123, which bfloat16 would round to 0.7109."""
    head = make_model().box_head
    for layer in (head.query, head.key, head.layers[2]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    center = torch.tensor([0.7123, 0.3001])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        boxes, _ = head(torch.ones(1, WIDTH), torch.ones(1, 4, IMAGE_WIDTH), center.expand(1, 4, 2))
    torch.testing.assert_close(boxes, torch.tensor([[*center, 0.5, 0.5]]), rtol=0, atol=1e-5)


# box, target box, IoU, 1 - GIoU = 1 - IoU + (enclosing - union) / enclosing


def random_boxes(count, seed):
    corners = torch.rand(count, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 100
    return torch.cat((corners.amin(1), corners.amax(1)), dim=1)


def test_values_are_torchvisions():
    boxes, targets = random_boxes(200, seed=1), random_boxes(200, seed=2)
    iou = torchvision.ops.box_iou(boxes, targets).diagonal()
    assert 50 < (iou == 0).sum() < 150  # both boxes that meet and boxes that do not
    torch.testing.assert_close(paired_box_iou(boxes, targets), iou)
    expected = torchvision.ops.generalized_box_iou_loss(boxes, targets)
    torch.testing.assert_close(generalized_box_iou_loss(boxes, targets), expected, rtol=1e-6, atol=1e-8)


def test_gradients_are_torchvisions():
    gradients = []
    for loss_function in (generalized_box_iou_loss, torchvision.ops.generalized_box_iou_loss):
        boxes, targets = random_boxes(200, seed=1).requires_grad_(), random_boxes(200, seed=2).requires_grad_()
        loss_function(boxes, targets).sum().backward()
        gradients.append((boxes.grad, targets.grad))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("target", [(0.2, 0.2, 0.2, 0.2), (0.7, 0.2, 0.7, 0.2), (0.1, 0.1, 0.4, 0.3)], ids=str)
def test_a_box_without_area_gives_finite_values_and_gradients(target):
    box, target = torch.tensor([[0.2, 0.2, 0.2, 0.2]], requires_grad=True), torch.tensor([target])
    assert paired_box_iou(box, target).item() == 0
    loss = generalized_box_iou_loss(box, target)
    loss.sum().backward()
    assert 1 <= loss.item() <= 2
    assert box.grad.isfinite().all()
