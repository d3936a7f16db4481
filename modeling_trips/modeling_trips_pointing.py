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
Where attention to image tokens lies, and how far that is from the region that a text is about: what teaches the head
of boxes, and the [CLS] of a question, where to look.
"""

import torch

from .losses_trips import SMALLEST_ATTENTION, region_targets, selection_loss
from .modeling_trips_vision import TripsSelection, next_candidates
from .patch_selection import PADDING


def token_indices(selection: tuple[TripsSelection, ...], image_states: torch.Tensor) -> torch.LongTensor:
    """
    Which patches the image tokens behind [CLS] are: `(num_texts or 1, num_tokens)`, in row-major order of the image;
    negative for a fused token and for padding.
    """
    num_tokens, device = image_states.shape[1], image_states.device
    if selection:
        return next_candidates(selection[-1], num_tokens).to(device)
    return torch.arange(num_tokens, device=device)[None]


def pointing_losses(
    weights: torch.Tensor, indices: torch.LongTensor, regions: torch.Tensor, grid_size: tuple[int, int]
) -> torch.Tensor:
    """
    How far attention is from each text's region, as [`selection_loss`] tells it of the patches that were kept. A fused
    token shows no place: what it gets counts neither for nor against. (Were it wrong to look at it, it would be taught
    to be unlike the region, and with it the scores that it is weighted by: to choose what the text is not about.)

    Args:
        weights (`torch.Tensor` of shape `(num_texts, num_tokens)`): attention to the image tokens behind [CLS]; with
            what else is attended to, rows sum to 1. Padding gets none.
        indices (`torch.LongTensor` of shape `(num_texts or 1, num_tokens)`): see `token_indices`.
        regions (`torch.Tensor` of shape `(num_texts, 4)`): see [`region_targets`].
        grid_size (`tuple(int, int)`): patches down and across.

    Returns:
        `torch.Tensor` of shape `(num_texts,)`, float32; 0 where nothing of the region is among them.
    """
    indices = indices.to(weights.device).masked_fill(indices < 0, PADDING).expand_as(weights)
    to_fused = weights.where(indices == PADDING, 0.0).sum(dim=-1, keepdim=True)
    weights = weights / (1.0 - to_fused).clamp(min=SMALLEST_ATTENTION)
    return selection_loss(weights, indices, region_targets(regions.to(weights.device), grid_size))


__all__ = ["pointing_losses", "token_indices"]
