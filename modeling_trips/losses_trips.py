# Copyright 2026 The TRIPS for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
The losses of TRIPS as pure functions on tensors, and over how many items of all processes they are means. No function
syncs with the host.
"""

import torch
from torch import distributed, nn


# Areas below this count as it: a union or an enclosing box of no area divides nothing.
SMALLEST_AREA = 1e-12
SMALLEST_ATTENTION = 1e-6  # to a candidate, before its logarithm is taken


def _areas(boxes: torch.Tensor) -> torch.Tensor:
    x0, y0, x1, y1 = boxes.unbind(-1)
    return (x1 - x0) * (y1 - y0)


def _intersections_and_unions(boxes: torch.Tensor, target_boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    top_left = torch.maximum(boxes[..., :2], target_boxes[..., :2])
    bottom_right = torch.minimum(boxes[..., 2:], target_boxes[..., 2:])
    widths, heights = (bottom_right - top_left).clamp(min=0).unbind(-1)
    intersections = widths * heights
    return intersections, _areas(boxes) + _areas(target_boxes) - intersections


def paired_box_iou(boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
    """
    Intersection over union of box i and target box i (`torchvision.ops.box_iou` pairs each with all).

    Args:
        boxes, target_boxes (`torch.Tensor` of shape `(num_boxes, 4)`): corners (x0, y0, x1, y1) in any one unit.

    Returns:
        `torch.Tensor` of shape `(num_boxes,)`, in [0, 1]. It is 0 where both boxes have no area.
    """
    intersections, unions = _intersections_and_unions(boxes, target_boxes)
    return intersections / unions.clamp(min=SMALLEST_AREA)


def generalized_box_iou_loss(boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
    """
    `1 - GIoU` of box i and target box i (https://arxiv.org/abs/1902.09630). Boxes that do not meet are drawn together:
    the share of their enclosing box that neither covers is added to the loss.

    `torchvision.ops.generalized_box_iou_loss` gives the same values, but a model's code does without torchvision, and
    a GPU would wait for its mask of the boxes that meet.

    Args:
        boxes, target_boxes (`torch.Tensor` of shape `(num_boxes, 4)`): corners (x0, y0, x1, y1) in any one unit.

    Returns:
        `torch.Tensor` of shape `(num_boxes,)`, in [0, 2].
    """
    intersections, unions = _intersections_and_unions(boxes, target_boxes)
    top_left = torch.minimum(boxes[..., :2], target_boxes[..., :2])
    bottom_right = torch.maximum(boxes[..., 2:], target_boxes[..., 2:])
    enclosing = _areas(torch.cat((top_left, bottom_right), dim=-1))
    iou = intersections / unions.clamp(min=SMALLEST_AREA)
    return 1 - iou + (enclosing - unions) / enclosing.clamp(min=SMALLEST_AREA)


def box_l1_loss(boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
    """
    L1 distance of box i and target box i, in whatever format both have: `(num_boxes, 4)` -> `(num_boxes,)`, the sum
    over the four numbers.
    """
    return (boxes - target_boxes).abs().sum(dim=-1)


def masked_language_loss(
    logits: torch.Tensor,
    labels: torch.LongTensor,
    teacher_logits: torch.Tensor | None = None,
    teacher_weight: float = 0.0,
    num_masked: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Cross-entropy of the masked tokens, the mean over them. With a momentum teacher (ALBEF, equation 7), the share
    `teacher_weight` of the target is what the teacher guesses.

    Args:
        logits, teacher_logits (`torch.Tensor` of shape `(num_texts, text_length, vocab_size)`)
        labels (`torch.LongTensor` of shape `(num_texts, text_length)`): -100 where nothing is masked.
        teacher_weight (`float`, *optional*, defaults to 0.0)
        num_masked (`torch.Tensor` of shape `()`, *optional*): what the sum over the tokens is divided by. By default
            their number.

    Returns:
        `torch.Tensor` of shape `()`, float32. It is 0 if nothing is masked.
    """
    log_probabilities = logits.float().log_softmax(dim=-1)
    masked = labels != -100
    losses = nn.functional.nll_loss(log_probabilities.transpose(1, 2), labels, reduction="none")
    if teacher_logits is not None:
        guesses = teacher_logits.detach().float().softmax(dim=-1)
        soft_losses = -(guesses * log_probabilities).sum(dim=-1) * masked
        losses = teacher_weight * soft_losses + (1.0 - teacher_weight) * losses
    return losses.sum() / (masked.sum().clamp_min(1) if num_masked is None else num_masked)


def region_targets(regions: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """
    Where a text that is about a region should look: at each patch as much as it is a part of the region.

    Args:
        regions (`torch.Tensor` of shape `(num_texts, 4)`): boxes (center_x, center_y, width, height) in [0, 1] of the
            image. A text without a region has a box of no area.
        grid_size (`tuple(int, int)`): patches down and across.

    Returns:
        `torch.Tensor` of shape `(num_texts, num_patches)`, float32, patches in row-major order: each row sums to 1, or
        to 0 without a region in the image.
    """
    center_x, center_y, width, height = regions.float().unbind(-1)

    def overlaps(center: torch.Tensor, length: torch.Tensor, count: int) -> torch.Tensor:
        edges = torch.arange(count + 1, device=regions.device) / count
        start, end = (center - length / 2)[:, None], (center + length / 2)[:, None]
        return (torch.minimum(end, edges[1:]) - torch.maximum(start, edges[:-1])).clamp(min=0)

    rows, columns = grid_size
    areas = (overlaps(center_y, height, rows)[:, :, None] * overlaps(center_x, width, columns)[:, None]).flatten(1)
    return areas / areas.sum(dim=-1, keepdim=True).clamp(min=SMALLEST_AREA)


def targets_of_candidates(targets: torch.Tensor, candidate_indices: torch.LongTensor) -> torch.Tensor:
    """
    Of what should be looked at, the part of each candidate; a fused token has that of all patches which are no
    candidates, since they are behind it.

    Args:
        targets (`torch.Tensor` of shape `(num_texts, num_patches)`)
        candidate_indices (`torch.LongTensor` of shape `(num_texts, num_candidates)`): -1 for a fused token, -2 for
            padding, which has none.

    Returns:
        `torch.Tensor` of shape `(num_texts, num_candidates)`.
    """
    is_patch = candidate_indices >= 0
    shown = targets.gather(1, candidate_indices.clamp(min=0)) * is_patch
    hidden = (targets.sum(dim=-1) - shown.sum(dim=-1)).clamp(min=0)
    return shown.where(is_patch, hidden[:, None] * (candidate_indices == -1))


def selection_loss(scores: torch.Tensor, candidate_indices: torch.LongTensor, targets: torch.Tensor) -> torch.Tensor:
    """
    How far the attention that selects is from where it should be. It teaches a text to choose, which top-k has no
    gradient for.

    A region says where to look, not what in it matters: the target is the region weighted by the square root of what
    the text finds in it, and the loss the Kullback-Leibler divergence of the scores from that. (The weights themselves
    would be expectation maximisation, which soon looks at a patch or two; none would want all of a region alike.)

    Args:
        scores, candidate_indices (`torch.Tensor` of shape `(num_texts, num_candidates)`): attention of a selection
            layer or a head, and to which patches.
        targets (`torch.Tensor` of shape `(num_texts, num_patches)`): where to look, not negative; a row of zeros
            teaches nothing.

    Returns:
        `torch.Tensor` of shape `(num_texts,)`, float32.
    """
    scores = scores.float().clamp(min=SMALLEST_ATTENTION)
    targets = targets_of_candidates(targets.float(), candidate_indices) * scores.detach().sqrt()
    targets = targets / targets.sum(dim=-1, keepdim=True).clamp(min=SMALLEST_AREA)
    return (torch.xlogy(targets, targets) - targets * scores.log()).sum(dim=-1)


def num_processes() -> int:
    """How many processes train together; 1 if `torch.distributed` is not in use."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def mean_count(count: torch.Tensor) -> torch.Tensor:
    """
    The mean of a number of items (shape `()`) over the processes, at least one item in all of them.

    A process that divides the sum over its items by it has a loss whose mean over the processes, as data parallel
    training takes it, is the mean over all items, also if one process has more of them than another.
    """
    if num_processes() == 1:
        return count.clamp_min(1)
    total = count.clone()
    distributed.all_reduce(total)
    return total.clamp_min(1) / num_processes()


def weighted_sum(*weighted_losses: tuple[float, torch.Tensor | None]) -> torch.Tensor | None:
    """The sum of losses, each given with its weight; those that are `None` are left out, and so is a sum of none."""
    losses = [weight * loss for weight, loss in weighted_losses if loss is not None]
    return sum(losses) if losses else None
