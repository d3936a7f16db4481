"""
Diagnostics of a selection layer. The main failure is that the same patches are kept for every text. Watch the entropy
of the scores, the coverage of the image, the sensitivity to the text, and, for data with regions, the patch precision.
"""

import math

import torch

from ..modeling_trips_vision import TripsSelection
from ..schedule_trips import SelectionSchedule


SAME = 0.1  # sensitivity below which the choice does not depend on the text or image
DIFFERENT = 0.3


def score_entropy(selection: TripsSelection) -> torch.Tensor:
    """
    Compute the entropy of the scores over its maximum: 1 if all candidates score the same, 0 if one has all scores.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float32.
    """
    scores = selection.scores.float()
    entropy = -torch.special.xlogy(scores, scores).sum(dim=-1)
    return entropy / math.log(max(2, scores.shape[1]))


def kept_patches(selection: TripsSelection, num_patches: int) -> torch.BoolTensor:
    """
    Mark the kept patches of the grid, without fused tokens.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, num_patches)`.
    """
    kept = selection.kept_indices
    mask = torch.zeros(len(kept), num_patches + 1, dtype=torch.bool, device=kept.device)
    mask.scatter_(1, kept.where(kept >= 0, num_patches), True)  # the last column is cut off
    return mask[:, :num_patches]


def kept_coverage(selection: TripsSelection, num_patches: int) -> float:
    """Compute the share of the grid's patches that at least one row keeps."""
    return kept_patches(selection, num_patches).any(dim=0).float().mean().item()


def text_sensitivity(selection: TripsSelection, image_index: torch.LongTensor, num_patches: int) -> float:
    """
    Compute 1 minus the mean Jaccard index of the kept patches over all pairs of texts with the same image. At 0, the
    selection does not depend on the text.

    Args:
        selection ([`TripsSelection`]): Selection for texts of which some share their image.
        image_index (`torch.LongTensor` of shape `(batch_size,)`): Image of each row.
        num_patches (`int`): Patches of the grid.

    Returns:
        `float` in [0, 1].

    Raises:
        ValueError: No two rows have the same image.
    """
    return 1 - _mean_jaccard(selection, num_patches, image_index[:, None] == image_index)


def image_sensitivity(selection: TripsSelection, image_index: torch.LongTensor, num_patches: int) -> float:
    """
    Compute `text_sensitivity` over pairs of rows with different images. At 0, the selection ignores the image.

    Raises:
        ValueError: All rows have the same image.
    """
    return 1 - _mean_jaccard(selection, num_patches, image_index[:, None] != image_index)


def _mean_jaccard(selection: TripsSelection, num_patches: int, pairs: torch.BoolTensor) -> float:
    """Compute the mean Jaccard index of the kept patches of pairs of rows, from the upper triangle of `pairs`."""
    pairs = pairs.triu(diagonal=1)
    if not pairs.any():
        raise ValueError("`image_index` has no two rows to compare.")
    kept = kept_patches(selection, num_patches).float()
    num_kept = kept.sum(dim=-1)
    num_common = kept @ kept.T  # (batch_size, batch_size)
    num_in_either = num_kept[:, None] + num_kept - num_common
    jaccard = num_common / num_in_either.clamp_min(1)
    return jaccard[pairs.to(jaccard.device)].mean().item()


def describe_sensitivities(text_sensitivity: float | None, image_sensitivity: float | None) -> list[str]:
    """Return the sensitivities of a selection layer that were measured as sentences."""
    sentences = []
    for what, value in (("texts about one image", text_sensitivity), ("images", image_sensitivity)):
        if value is None:
            continue
        if value < SAME:
            degree = "the same patches"
        elif value < DIFFERENT:
            degree = "nearly the same patches"
        else:
            degree = "different patches"
        sentences.append(f"Two {what} keep {degree} ({value:.2f}).")
    return sentences


def advice(schedule: SelectionSchedule, text_sensitivity: float) -> list[str]:
    """Return what to change, in a sentence, if a text scores the last layer of a schedule and is ignored."""
    if schedule.selections[-1].guidance != "text" or text_sensitivity >= SAME:
        return []
    selections = tuple(selection._replace(guidance="image") for selection in schedule.selections)
    by_image = SelectionSchedule(schedule.layers, selections)
    return [f"The text is ignored ({text_sensitivity:.2f}): --schedule {by_image} costs less and keeps the same."]


def patch_precision(patch_boxes: torch.Tensor, region: torch.Tensor) -> float:
    """
    Compute the share of kept patches whose center lies in a region; 0 if nothing is kept. Random selection gives the
    region's share of the image.

    Args:
        patch_boxes (`torch.Tensor` of shape `(num_kept, 4)`): (x0, y0, x1, y1) of the kept patches of one text, see
            [`TripsProcessor.patch_boxes`].
        region (`torch.Tensor` of shape `(4,)`): (x0, y0, x1, y1) in the same pixels.
    """
    patch_start, patch_end = patch_boxes.chunk(2, dim=-1)  # (num_kept, 2) each
    centers = (patch_start + patch_end) / 2
    start, end = region.chunk(2)
    is_behind_start = centers >= start
    is_before_end = centers < end
    is_inside = (is_behind_start & is_before_end).all(dim=-1)  # (num_kept,)
    num_inside = is_inside.sum().item()
    return num_inside / max(1, len(patch_boxes))


def region_recall(patch_boxes: torch.Tensor, region: torch.Tensor) -> float:
    """
    Compute the share of a region's area in kept patches, which do not overlap. Random selection gives the share of
    kept patches. Arguments are those of `patch_precision`.
    """
    patch_start, patch_end = patch_boxes.chunk(2, dim=-1)  # (num_kept, 2) each
    start, end = region.chunk(2)
    shown_start = torch.maximum(patch_start, start)
    shown_end = torch.minimum(patch_end, end)
    shown_sides = (shown_end - shown_start).clamp(min=0)
    shown_area = shown_sides.prod(dim=-1).sum()
    area = (end - start).prod()
    return (shown_area / area).item()
