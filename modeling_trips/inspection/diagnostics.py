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
Is the selection healthy? Numbers that tell whether the text picks the patches, and which ones.

What can go wrong is that the same few patches are kept whatever the text says. Watch the entropy of the scores, how
much of the image some text keeps, how far the texts of one image agree, and, where data names the region that a text
is about, how much of what it keeps lies there. A [`TripsSelection`] is that of one selection layer.
"""

import torch

from ..modeling_trips_vision import TripsSelection
from ..patch_selection import PADDING


def score_entropy(selection: TripsSelection) -> torch.Tensor:
    """
    How evenly the scores are spread: 1 if all candidates score alike (nothing is preferred), 0 if one has it all.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float32: entropy over its largest possible value.
    """
    scores = selection.scores.float()
    entropy = -torch.special.xlogy(scores, scores).sum(dim=-1)
    num_candidates = (selection.candidate_indices != PADDING).sum(dim=-1)
    return entropy / num_candidates.clamp(min=2).log()


def kept_mass(selection: TripsSelection) -> torch.Tensor:
    """
    Share of the scores that the kept candidates hold: what the fused token is left with is the rest. At keep rate r it
    is about r where nothing is preferred.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float32.
    """
    largest_first = selection.scores.float().sort(dim=-1, descending=True).values  # kept are the largest
    return largest_first.cumsum(dim=-1).gather(1, num_kept(selection)[:, None] - 1)[:, 0]


def num_kept(selection: TripsSelection) -> torch.LongTensor:
    """
    How many candidates go on in each row: all the same, but with `selection_mode="mass"`.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`.
    """
    return (selection.kept_indices != PADDING).sum(dim=-1)


def kept_patches(selection: TripsSelection, num_patches: int) -> torch.BoolTensor:
    """
    Which patches of the grid go on as themselves; neither a fused token nor padding is one.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, num_patches)`.
    """
    kept = selection.kept_indices
    mask = torch.zeros(len(kept), num_patches + 1, dtype=torch.bool, device=kept.device)
    mask.scatter_(1, kept.where(kept >= 0, num_patches), True)  # all others go to a column that is cut off
    return mask[:, :num_patches]


def kept_coverage(selection: TripsSelection, num_patches: int) -> float:
    """Share of the grid's patches that at least one row keeps. Its least value is what a row keeps: all the same."""
    return kept_patches(selection, num_patches).any(dim=0).float().mean().item()


def text_sensitivity(selection: TripsSelection, image_index: torch.LongTensor, num_patches: int) -> float:
    """
    How much the texts of one image differ in what they keep: 1 minus the mean Jaccard index of the kept sets of all
    pairs of texts with the same image. 0: the text plays no part.

    Args:
        selection ([`TripsSelection`]): of texts of which some share their image.
        image_index (`torch.LongTensor` of shape `(batch_size,)`): the image of each row.
        num_patches (`int`): patches of the grid.

    Returns:
        `float` in [0, 1].

    Raises:
        ValueError: if no two rows have the same image.
    """
    same_image = image_index[:, None] == image_index
    if not same_image.triu(diagonal=1).any():
        raise ValueError("No two rows have the same image: sensitivity to the text compares the texts of an image.")
    return 1 - _mean_jaccard(selection, num_patches, same_image)


def image_sensitivity(selection: TripsSelection, image_index: torch.LongTensor, num_patches: int) -> float:
    """
    How much the rows of different images differ in what they keep, as in `text_sensitivity`. 0: the same patches are
    kept whatever the image shows.

    Raises:
        ValueError: if all rows have the same image.
    """
    other_image = image_index[:, None] != image_index
    if not other_image.any():
        raise ValueError("All rows have the same image: sensitivity to the image compares rows of different ones.")
    return 1 - _mean_jaccard(selection, num_patches, other_image)


def _mean_jaccard(selection: TripsSelection, num_patches: int, pairs: torch.BoolTensor) -> float:
    """The mean Jaccard index of the kept sets of pairs of rows, of which the half above the diagonal counts."""
    kept = kept_patches(selection, num_patches).float()
    common = kept @ kept.T
    sizes = kept.sum(dim=-1)
    jaccard = common / (sizes[:, None] + sizes - common).clamp_min(1)
    return jaccard[pairs.triu(diagonal=1).to(jaccard.device)].mean().item()


def share_inside(patch_boxes: torch.Tensor, region: torch.Tensor) -> float:
    """
    Share of kept patches whose centre lies in a region. At random it is the region's share of the image.

    Args:
        patch_boxes (`torch.Tensor` of shape `(num_kept, 4)`): (x0, y0, x1, y1) of the kept patches of one text, as
            [`TripsProcessor.patch_boxes`] gives.
        region (`torch.Tensor` of shape `(4,)`): (x0, y0, x1, y1), in the same pixels.

    Returns:
        `float` in [0, 1]; 0 if nothing is kept.
    """
    centers = (patch_boxes[:, :2] + patch_boxes[:, 2:]) / 2
    inside = (centers >= region[:2]) & (centers < region[2:])
    return inside.all(dim=-1).sum().item() / max(1, len(patch_boxes))


def share_shown(patch_boxes: torch.Tensor, region: torch.Tensor) -> float:
    """
    Share of a region's area that kept patches show. At random it is the share of the patches that are kept.

    Args:
        patch_boxes (`torch.Tensor` of shape `(num_kept, 4)`): as in `share_inside`; patches do not overlap.
        region (`torch.Tensor` of shape `(4,)`): (x0, y0, x1, y1) of some area, in the same pixels.

    Returns:
        `float` in [0, 1].
    """
    sides = torch.minimum(patch_boxes[:, 2:], region[2:]) - torch.maximum(patch_boxes[:, :2], region[:2])
    return (sides.clamp(min=0).prod(dim=-1).sum() / (region[2:] - region[:2]).prod()).item()


__all__ = [
    "image_sensitivity",
    "kept_coverage",
    "kept_mass",
    "kept_patches",
    "num_kept",
    "score_entropy",
    "share_inside",
    "share_shown",
    "text_sensitivity",
]
