"""Box losses against examples by hand and torchvision, including degenerate boxes."""

import pytest
import torch
import torchvision

from modeling_trips.modeling_trips_grounding import box_l1_loss, generalized_box_iou_loss, paired_box_iou


# box, target box, IoU, 1 - GIoU = 1 - IoU + (enclosing - union) / enclosing
BY_HAND = [
    ((0, 0, 2, 2), (0, 0, 2, 2), 1, 0),  # equal
    ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7, 6 / 7 + (9 - 7) / 9),  # they overlap in a corner
    ((0, 0, 4, 4), (1, 1, 3, 3), 4 / 16, 12 / 16),  # one inside of the other
    ((0, 0, 1, 1), (1, 0, 2, 1), 0, 1),  # they touch
    ((0, 0, 1, 1), (3, 0, 4, 1), 0, 1 + (4 - 2) / 4),  # apart
    ((0, 0, 1, 1), (9, 9, 10, 10), 0, 1 + (100 - 2) / 100),  # far apart
]


def random_boxes(count, seed):
    corners = torch.rand(count, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 100
    return torch.cat((corners.amin(1), corners.amax(1)), dim=1)


@pytest.mark.parametrize("swapped", [False, True])
def test_iou_and_its_loss_by_hand(swapped):
    boxes, targets, iou, loss = (torch.tensor(column, dtype=torch.float32) for column in zip(*BY_HAND))
    if swapped:
        boxes, targets = targets, boxes
    torch.testing.assert_close(paired_box_iou(boxes, targets), iou)
    torch.testing.assert_close(generalized_box_iou_loss(boxes, targets), loss)


def test_l1_loss_by_hand():
    boxes = torch.tensor([[0.5, 0.5, 0.25, 1.0], [0.0, 0.0, 0.0, 0.0]])
    targets = torch.tensor([[0.25, 0.75, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    assert box_l1_loss(boxes, targets).tolist() == [0.25 + 0.25 + 0.25 + 0.5, 0.0]


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


def test_small_boxes_count_as_large_ones_do():
    small = torch.tensor([[0.5, 0.5, 0.501, 0.501], [0.5, 0.5, 0.502, 0.501]])
    assert generalized_box_iou_loss(small, small).abs().max() < 1e-4
    torch.testing.assert_close(paired_box_iou(small[:1], small[1:]), torch.tensor([0.5]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("target", [(0.2, 0.2, 0.2, 0.2), (0.7, 0.2, 0.7, 0.2), (0.1, 0.1, 0.4, 0.3)], ids=str)
def test_a_box_without_area_gives_finite_values_and_gradients(target):
    box, target = torch.tensor([[0.2, 0.2, 0.2, 0.2]], requires_grad=True), torch.tensor([target])
    assert paired_box_iou(box, target).item() == 0
    loss = generalized_box_iou_loss(box, target)
    loss.sum().backward()
    assert 1 <= loss.item() <= 2
    assert box.grad.isfinite().all()
