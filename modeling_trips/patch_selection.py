# SPDX-FileCopyrightText: 2026 The TRIPS for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""
The patch selection of TRIPS (https://arxiv.org/abs/2403.07883, section 3.2) as pure functions: score, keep, fuse.

The functions never form a full attention map. Shapes depend on shapes and rates only, and nothing syncs with the host.
"""

import math

import torch


FUSED_TOKEN = -1  # index of a candidate that is not a patch
# Lower scores have the logarithm of this one, whose gradient is finite even with the scale of a loss in float16.
LOWEST_SCORE = 1e-20


def num_kept_tokens(num_candidates: int, keep_rate: float) -> int:
    """
    Return the number of kept candidates: `ceil(keep_rate * num_candidates)`, at least 1.

    The product is lowered by 1e-6 first: 0.1 of 30 is 3, although `0.1 * 30 > 3` in floating point.
    """
    return max(1, math.ceil(keep_rate * num_candidates - 1e-6))


def score_tokens(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    Return the attention of one guiding token to each candidate, averaged over the heads.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, head_dim)`): The guiding token's query.
        key (`torch.Tensor` of shape `(batch_size, num_heads, num_candidates, head_dim)`): The candidates' keys.
        scaling (`float`): Factor of the dot products, usually `head_dim ** -0.5`.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_candidates)`, float32 or wider. Each row is positive and sums to 1.
    """
    # A product and a sum, since autocast would lower the precision of a matmul and rounding would tie patches.
    dtype = torch.promote_types(key.dtype, torch.float32)
    query = query.to(dtype) * scaling
    products = key.to(dtype) * query.unsqueeze(2)
    logits = products.sum(dim=-1)  # (batch_size, num_heads, num_candidates)
    return logits.softmax(dim=-1).mean(dim=1)


def random_scores(batch_size: int, num_candidates: int, device: torch.device) -> torch.Tensor:
    """
    Return random scores from PyTorch's generator, the floor of every guidance: another choice for each row and call.
    They are of shape `(batch_size, num_candidates)`, float32; each row is positive and sums to 1.
    """
    scores = torch.rand(batch_size, num_candidates, device=device) + 1e-6
    return scores / scores.sum(dim=-1, keepdim=True)


def keep_topk(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """
    Return the positions of the `num_kept` largest scores, in ascending order: `(batch_size, num_candidates)` ->
    `(batch_size, num_kept)`. Of equal scores the lower position wins. NaN ranks last.
    """
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    lowest_kept = scores.topk(num_kept, dim=-1).values[:, -1:]  # (batch_size, 1)
    # Of those that equal the lowest kept score, the first are kept. A stable sort would do it, but ONNX has none.
    is_above = scores > lowest_kept
    is_tied = scores == lowest_kept
    num_ties_kept = num_kept - is_above.sum(dim=-1, keepdim=True)
    return positions_of(is_above | first_true(is_tied, num_ties_kept), num_kept)


def first_true(mask: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Return a mask of the first `number`, `(batch_size, 1)`, True entries of each row of a mask."""
    return mask & (mask.long().cumsum(dim=-1) <= number)


def positions_of(is_kept: torch.Tensor, num_kept: int) -> torch.Tensor:
    """
    Return the positions of the `num_kept` True entries of each row, in ascending order: `(batch_size, num_candidates)`
    -> `(batch_size, num_kept)`.
    """
    last = is_kept.shape[1] - 1
    positions = torch.arange(last + 1, device=is_kept.device)
    positions = positions.where(is_kept, last)  # the others go to the end
    return positions.sort(dim=-1).values[:, :num_kept]


def log_scores(scores: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of scores, float32 or wider. Below `LOWEST_SCORE` it is that of this score."""
    return scores.clamp(min=LOWEST_SCORE).log()


def gather_tokens(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    Return the tokens at `positions`: `(batch_size, num_tokens, hidden_size)` and `(batch_size, num_kept)` ->
    `(batch_size, num_kept, hidden_size)`.
    """
    index = positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, index)


def fuse_tokens(tokens: torch.Tensor, scores: torch.Tensor, kept_positions: torch.Tensor) -> torch.Tensor:
    """
    Return the fused token, `(batch_size, 1, hidden_size)`: the sum of the tokens `(batch_size, num_candidates,
    hidden_size)` that are not kept, weighted by their scores.

    Top-k has no gradient. The scores, and through them the guiding text, get their gradient from this sum.
    """
    weights = scores.scatter(1, kept_positions, 0.0).to(tokens.dtype)
    fused = torch.bmm(weights.unsqueeze(1), tokens)
    return fused.to(tokens.dtype)  # autocast lowers the precision of `bmm`


def choose_tokens(scores: torch.Tensor, keep_rate: float) -> torch.Tensor:
    """
    Return the positions of the kept candidates, in ascending order: `(batch_size, num_candidates)` -> `(batch_size,
    num_kept)`. `keep_rate`, in (0, 1], is their share.
    """
    return keep_topk(scores, num_kept_tokens(scores.shape[1], keep_rate))


def shorten_tokens(tokens: torch.Tensor, scores: torch.Tensor, kept: torch.Tensor, fuse: bool = True) -> torch.Tensor:
    """
    Shorten a sequence of p other tokens (here [CLS]) and n candidates to these p, the k kept candidates in their
    original order and, with `fuse`, one token for the rest.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, p + n, hidden_size)`)
        scores (`torch.Tensor` of shape `(batch_size, n)`)
        kept (`torch.LongTensor` of shape `(batch_size, k)`): Result of [`choose_tokens`]. If all are kept, `tokens`
            are returned unchanged, without a fused token.
        fuse (`bool`, *optional*, defaults to `True`): Whether the others become one token, or are dropped.

    Returns:
        `torch.Tensor` of shape `(batch_size, p + k + 1, hidden_size)` (`p + k` without `fuse`).
    """
    num_candidates = scores.shape[1]
    if kept.shape[1] == num_candidates:
        return tokens
    others, candidates = tokens.split((tokens.shape[1] - num_candidates, num_candidates), dim=1)
    parts = [others, gather_tokens(candidates, kept)]
    if fuse:
        parts.append(fuse_tokens(candidates, scores, kept))
    return torch.cat(parts, dim=1)


def select_rows(tensor: torch.Tensor | None, index: torch.LongTensor | None) -> torch.Tensor | None:
    """Return the rows `index` of a tensor. Without an index, all rows."""
    if tensor is None or index is None:
        return tensor
    return tensor.index_select(0, index.to(tensor.device))


# Supervision of scores and attention by regions


SMALLEST_AREA = 1e-12  # of a region, before it is a divisor
SMALLEST_ATTENTION = 1e-6  # to a candidate, before its logarithm is taken


def region_targets(regions: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """
    Return the share of each text's region that lies in each patch.

    Args:
        regions (`torch.Tensor` of shape `(num_texts, 4)`): Boxes (center_x, center_y, width, height) in [0, 1] of the
            image. A text without a region has a box without area.
        grid_size (`tuple(int, int)`): Patches down and across.

    Returns:
        `torch.Tensor` of shape `(num_texts, num_patches)`, float32, patches in row-major order. Each row sums to 1, or
        to 0 without a region in the image.
    """
    num_rows, num_columns = grid_size
    center_x, center_y, width, height = regions.float().unbind(-1)
    heights = overlaps(center_y, height, num_rows)  # (num_texts, num_rows)
    widths = overlaps(center_x, width, num_columns)  # (num_texts, num_columns)
    areas = heights[:, :, None] * widths[:, None]  # (num_texts, num_rows, num_columns)
    areas = areas.flatten(1)
    return areas / areas.sum(dim=-1, keepdim=True).clamp(min=SMALLEST_AREA)


def overlaps(centers: torch.Tensor, lengths: torch.Tensor, num_parts: int) -> torch.Tensor:
    """
    Return the length of each interval, given by its center and length, `(num_intervals,)`, in each of the equal parts
    of [0, 1]: `(num_intervals, num_parts)`.
    """
    edges = torch.arange(num_parts + 1, device=centers.device) / num_parts
    starts = centers - lengths / 2
    ends = centers + lengths / 2
    last_starts = torch.maximum(starts[:, None], edges[:-1])
    first_ends = torch.minimum(ends[:, None], edges[1:])
    return (first_ends - last_starts).clamp(min=0)


def targets_of_candidates(targets: torch.Tensor, candidate_indices: torch.LongTensor) -> torch.Tensor:
    """
    Return the target of each candidate, `(num_texts, num_candidates)`: a patch has its own, a fused token that of all
    patches which are not candidates. `targets` is of shape `(num_texts, num_patches)`.
    """
    is_patch = candidate_indices >= 0
    shown = targets.gather(1, candidate_indices.clamp(min=0)) * is_patch
    hidden = (targets.sum(dim=-1) - shown.sum(dim=-1)).clamp(min=0)
    return shown.where(is_patch, hidden[:, None])


def union_of_targets(targets: torch.Tensor, image_index: torch.LongTensor, num_images: int) -> torch.Tensor:
    """
    Return the union of the targets `(num_texts, num_patches)` of the texts of each image, for layers that the image
    scores: at each patch the largest target of the image's texts. A text without a target, a row of zeros, keeps it.
    """
    index = image_index[:, None].expand_as(targets)
    union = targets.new_zeros(num_images, targets.shape[1])
    union = union.scatter_reduce(0, index, targets, "amax")  # (num_images, num_patches)
    has_target = targets.sum(dim=-1, keepdim=True) > 0
    return union[image_index] * has_target


def selection_loss(scores: torch.Tensor, candidate_indices: torch.LongTensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Return the selection supervision, `(num_texts,)`, float32: the Kullback-Leibler divergence of the scores from the
    targets. Top-k itself has no gradient.

    A region does not tell which of its patches matter, so that targets are weighted by the square root of the scores.
    (The scores themselves would be expectation maximisation, which collapses to a patch or two; without weights, all
    patches of a region would be equally important.)

    Args:
        scores, candidate_indices (`torch.Tensor` of shape `(num_texts, num_candidates)`): Attention of a selection
            layer or a head, and the patches that it is paid to.
        targets (`torch.Tensor` of shape `(num_texts, num_patches)`): Not negative. The loss of a row of zeros is 0.
    """
    return divergence(scores, targets_of_candidates(targets.float(), candidate_indices))


def divergence(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of [`selection_loss`] for targets of the candidates, `(num_texts, num_candidates)`."""
    scores = scores.float().clamp(min=SMALLEST_ATTENTION)
    targets = targets * scores.detach().sqrt()
    targets = targets / targets.sum(dim=-1, keepdim=True).clamp(min=SMALLEST_AREA)
    return (torch.xlogy(targets, targets) - targets * scores.log()).sum(dim=-1)


# Relevance of the image tokens to the loss


class RelevanceGradient(torch.autograd.Function):
    """
    Image states as they are, with a loss of 0 for each row. In the backward pass of this loss, the scores get the
    gradient of their cross-entropy with the *relevance* of the candidates: -g . h for the state h of a candidate and
    the gradient g of the other losses, 0 where that is negative, normalized over the candidates. To first order, it is
    the part of the loss that the candidate takes off. The backward pass also writes the cross-entropy to `values`.
    """

    @staticmethod
    def forward(ctx, states, scores, values):
        """
        Args:
            states (`torch.Tensor` of shape `(num_rows, 1 + num_candidates, hidden_size)`): [CLS], then candidates.
            scores (`torch.Tensor` of shape `(num_rows, num_candidates)`)
            values (`torch.Tensor` of shape `(num_rows,)`)
        """
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(states, scores)
        ctx.values = values
        return states.view_as(states), scores.new_zeros(len(scores))

    @staticmethod
    def backward(ctx, grad_states, grad_losses):
        if grad_states is None or grad_losses is None:  # as in a pass whose relevance loss nobody adds
            return grad_states, None, None
        states, scores = ctx.saved_tensors
        gradient_dot_state = (grad_states.to(scores.dtype) * states).sum(dim=-1)
        relevance = -gradient_dot_state[:, 1:].clamp(max=0)
        total = relevance.sum(dim=-1, keepdim=True)
        targets = relevance / total.clamp(min=torch.finfo(total.dtype).tiny)
        ctx.values.copy_(-(targets * log_scores(scores)).sum(dim=-1))
        grad_scores = -grad_losses[:, None] * targets / scores.clamp(min=LOWEST_SCORE)
        return grad_states, grad_scores, None
