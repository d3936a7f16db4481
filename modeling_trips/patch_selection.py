# SPDX-FileCopyrightText: 2026 The TRIPS for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""
The patch selection of TRIPS (https://arxiv.org/abs/2403.07883, section 3.2) as pure functions: score, keep, fuse.

The functions never form a full attention map. Shapes depend on shapes and rates only, and nothing syncs with the host.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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


def draw_kept(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """
    Return the positions of `num_kept` candidates that are drawn by their scores, without repetition, in ascending
    order: `(batch_size, num_candidates)` -> `(batch_size, num_kept)`.

    They are the best by log scores with Gumbel noise (https://arxiv.org/abs/1903.06059).
    """
    logits = log_scores(scores.detach())
    gumbel_noise = -torch.empty_like(scores).exponential_().log()
    return keep_topk(logits + gumbel_noise, num_kept)


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


class TokenChoice(NamedTuple):
    """
    What one layer keeps of its candidates.

    Args:
        kept (`torch.LongTensor` of shape `(batch_size, num_kept)`): Positions of the kept candidates, ascending.
        probed (`torch.LongTensor` of shape `(batch_size, num_probed)`, *optional*): Positions of dropped candidates
            that run beside the kept ones for the gate.
        gate (`torch.Tensor` of shape `(batch_size, num_kept + num_probed)`, *optional*): Their gate, see
            [`gate_of_best`] and [`gate_of_drawn`].
    """

    kept: torch.Tensor
    probed: torch.Tensor | None = None
    gate: torch.Tensor | None = None


def choose_tokens(scores: torch.Tensor, keep_rate: float, probe_share: float = 0.0, draw: bool = False) -> TokenChoice:
    """
    Decide which candidates are kept and, for the gate, which of the others also run.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, num_candidates)`)
        keep_rate (`float`): Share of the candidates to keep, in (0, 1].
        probe_share (`float`, *optional*, defaults to 0.0): Share of the dropped candidates that also run, in [0, 1].
            0: there is no gate.
        draw (`bool`, *optional*, defaults to `False`): Whether, with a gate, the kept candidates are drawn by their
            scores, as in [`draw_kept`], or are the best.
    """
    num_candidates = scores.shape[1]
    num_kept = num_kept_tokens(num_candidates, keep_rate)
    if num_kept == num_candidates:
        positions = torch.arange(num_candidates, device=scores.device)
        return TokenChoice(kept=positions.expand(scores.shape))
    if probe_share == 0:
        return TokenChoice(kept=keep_topk(scores, num_kept))
    kept = draw_kept(scores, num_kept) if draw else keep_topk(scores, num_kept)
    probed = draw_probed(scores, kept, probe_share)
    positions = torch.cat((kept, probed), dim=1)
    gate = gate_of_drawn(scores, positions) if draw else gate_of_best(scores, kept, positions)
    return TokenChoice(kept=kept, probed=probed, gate=gate)


def shorten_tokens(tokens: torch.Tensor, scores: torch.Tensor, choice: TokenChoice, fuse: bool = True) -> torch.Tensor:
    """
    Shorten a sequence of p other tokens (here [CLS]) and n candidates to these p, the k kept candidates in their
    original order, with `fuse` one token for the rest, and the candidates that run for the gate.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, p + n, hidden_size)`)
        scores (`torch.Tensor` of shape `(batch_size, n)`)
        choice ([`TokenChoice`]): Result of [`choose_tokens`]. If all are kept, `tokens` are returned unchanged,
            without a fused token.
        fuse (`bool`, *optional*, defaults to `True`): Whether the others become one token, or are dropped.

    Returns:
        `torch.Tensor` of shape `(batch_size, p + k + 1 + num_probed, hidden_size)` (`p + k + num_probed` without
        `fuse`).
    """
    num_candidates = scores.shape[1]
    if choice.kept.shape[1] == num_candidates:
        return tokens
    others, candidates = tokens.split((tokens.shape[1] - num_candidates, num_candidates), dim=1)
    parts = [others, gather_tokens(candidates, choice.kept)]
    if fuse:
        parts.append(fuse_tokens(candidates, scores, choice.kept))
    if choice.probed is not None:
        parts.append(gather_tokens(candidates, choice.probed))
    return torch.cat(parts, dim=1)


class TokenSelector:
    """
    How a layer chooses tokens: it keeps the best and fuses the others. Subclasses choose in another way, shorten in
    another way, or add to the loss. A [`TripsVisionModel`] gives its `selector`, if it has one, to each layer that
    selects.
    """

    def choose(self, scores: torch.Tensor, keep_rate: float) -> TokenChoice:
        """Decide what is kept, by the scores of the candidates, `(batch_size, num_candidates)`: [`choose_tokens`]."""
        return choose_tokens(scores, keep_rate)

    def shorten(
        self, tokens: torch.Tensor, scores: torch.Tensor, choice: TokenChoice, fuse: bool = True
    ) -> torch.Tensor:
        """Shorten the tokens to those of the choice: [`shorten_tokens`]."""
        return shorten_tokens(tokens, scores, choice, fuse)

    def loss_term(self, inputs: dict, outputs: Any) -> torch.Tensor | float:
        """Return what a training step with these inputs and outputs of the model adds to its loss."""
        return 0.0


class GateSelector(TokenSelector):
    """Also runs dropped tokens, for the gate. The arguments are those of [`choose_tokens`]."""

    def __init__(self, probe_share: float, draw: bool = False):
        self.probe_share = probe_share
        self.draw = draw

    def choose(self, scores: torch.Tensor, keep_rate: float) -> TokenChoice:
        return choose_tokens(scores, keep_rate, self.probe_share, self.draw)


# Attention, and the gate: scores that learn from the loss


def select_rows(tensor: torch.Tensor | None, index: torch.LongTensor | None) -> torch.Tensor | None:
    """Return the rows `index` of a tensor. Without an index, all rows."""
    if tensor is None or index is None:
        return tensor
    return tensor.index_select(0, index.to(tensor.device))


class KeyInfo(NamedTuple):
    """
    What attention needs to know about its keys. It travels where a mask alone would.

    Args:
        mask (`torch.Tensor`, *optional*): Hides padding, in the form of the attention in use; with a gate
            broadcastable to `(batch_size, 1, num_queries, num_keys)`.
        index (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Queries of row i attend to row `index[i]` of
            the keys, by default to row i.
        gate (`torch.Tensor` of shape `(num_rows, num_keys)`, *optional*): See [`gate_of_best`], [`gate_of_drawn`]. A
            key that nothing scores has a constant.
        num_probed (`int`, *optional*, defaults to 0): Number of dropped tokens at the end of the keys, which only
            teach the gate.
        is_probed (`torch.BoolTensor` of shape `(num_rows, num_keys)`, *optional*): The same as a mask, where they
            stand between other keys.
    """

    mask: Any = None
    index: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    num_probed: int = 0
    is_probed: torch.Tensor | None = None

    def of_rows(self, index: torch.Tensor | None) -> "KeyInfo":
        """Return this for the rows `index` of the keys, by default all. The mask already has one row per query."""
        return self._replace(index=None, gate=select_rows(self.gate, index))


def draw_probed(scores: torch.Tensor, kept_positions: torch.Tensor, share: float) -> torch.Tensor:
    """
    Return the positions of a random sample of the candidates that are not kept, without repetition: `(batch_size,
    num_probed)` with `num_probed = ceil(share * num_dropped)` and a share in (0, 1].
    """
    num_probed = num_kept_tokens(scores.shape[1] - kept_positions.shape[1], share)
    ranks = torch.rand_like(scores)  # in [0, 1)
    ranks = ranks.scatter(1, kept_positions, -1.0)  # the kept ones rank behind
    return ranks.topk(num_probed, dim=-1).indices


def gate_of_best(scores: torch.Tensor, kept_positions: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    Return the gate of the candidates at `positions`, `(batch_size, num_positions)`, where the best are kept.

    [`attend`] takes a gate as 1 for a kept candidate and as 0 for a dropped one, and gives it the gradient
    of that value (straight-through estimator, https://arxiv.org/abs/1308.3432); the gate's own value does not count.
    Here it is a sigmoid of the distance of the log scores from the threshold, midway between the lowest kept and the
    highest dropped one. Candidates that are far from it learn nothing.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, num_candidates)`): Positive.
        kept_positions (`torch.LongTensor` of shape `(batch_size, num_kept)`): Fewer than all candidates.
        positions (`torch.LongTensor` of shape `(batch_size, num_positions)`)
    """
    logits = log_scores(scores)
    with torch.no_grad():
        logits_of_kept = logits.gather(1, kept_positions)
        logits_of_dropped = logits.scatter(1, kept_positions, -math.inf)
        lowest_kept = logits_of_kept.amin(dim=-1, keepdim=True)
        highest_dropped = logits_of_dropped.amax(dim=-1, keepdim=True)
        threshold = (lowest_kept + highest_dropped) / 2
    return (logits.gather(1, positions) - threshold).sigmoid()


def gate_of_drawn(scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    Return the gate of the candidates at `positions`, `(batch_size, num_positions)`, where [`draw_kept`] keeps them.

    There is no threshold, so all have the gradient of the middle of the sigmoid in [`gate_of_best`]: a quarter of that
    of their log score.
    """
    return log_scores(scores).gather(1, positions) / 4


class GateGradient(torch.autograd.Function):
    """
    The output of the attention to the kept tokens, as it is. Its backward pass gives the gate of key j the gradient
    sum over heads and queries of p_j * grad_output . (v_j - output), with p the attention among all tokens.
    """

    @staticmethod
    def forward(ctx, attn_output, gate, query, key, value, attention_mask, scaling):
        ctx.save_for_backward(attn_output, gate, query, key, value, attention_mask)
        ctx.scaling = scaling
        return attn_output.view_as(attn_output)

    @staticmethod
    def backward(ctx, grad_output):
        attn_output, gate, query, key, value, attention_mask = ctx.saved_tensors
        queries_per_key = query.shape[1] // key.shape[1]  # query heads that share a head of keys and values
        key = key.repeat_interleave(queries_per_key, dim=1)  # (batch_size, num_heads, num_keys, head_dim)
        value = value.repeat_interleave(queries_per_key, dim=1)
        dtype = torch.promote_types(query.dtype, torch.float32)

        logits = query @ key.transpose(2, 3)  # (batch_size, num_heads, num_queries, num_keys)
        logits = logits.to(dtype) * ctx.scaling
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            lowest = torch.finfo(dtype).min  # finite, for the rows of padding, which see no key
            logits = logits.masked_fill(~attention_mask, lowest)
        elif attention_mask is not None:
            logits = logits + attention_mask

        # `grad_output` and `attn_output` are of shape (batch_size, num_queries, num_heads, head_dim).
        grad_by_head = grad_output.transpose(1, 2).to(value.dtype)
        grad_dot_value = grad_by_head @ value.transpose(2, 3)  # (batch_size, num_heads, num_queries, num_keys)
        grad_dot_output = (grad_output.to(dtype) * attn_output).sum(dim=-1)
        grad_dot_output = grad_dot_output.transpose(1, 2).unsqueeze(-1)  # (batch_size, num_heads, num_queries, 1)
        weights = logits.softmax(dim=-1)
        grad_gate = (weights * (grad_dot_value - grad_dot_output)).sum(dim=(1, 2))  # (batch_size, num_keys)
        return grad_output, grad_gate.to(gate.dtype), None, None, None, None, None


def attend(
    attention: Callable,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_info: KeyInfo,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Call an attention function of Transformers on keys of which some are dropped tokens that run for the gate.

    Without a gate this is the call alone. With one, the output is that of the attention to the other keys, and
    [`GateGradient`] tells the gate what the loss would gain or lose, to first order, if a little of a token was there.
    (With the attention among the kept keys in place of that among all, gradients of dropped tokens have no bound.)

    Args:
        attention (`Callable`): Attention function, as of `ALL_ATTENTION_FUNCTIONS`.
        query, key, value (`torch.Tensor` of shape `(batch_size, num_heads, num_tokens, head_dim)`)
        key_info ([`KeyInfo`]): With one row per query.

    Raises:
        ValueError: With a gate, the mask has another form, as FlashAttention and FlexAttention need it.
    """
    mask = key_info.mask
    if key_info.gate is None:
        return attention(module, query, key, value, mask, **kwargs)
    if mask is not None and getattr(mask, "ndim", 0) != 4:
        raise ValueError("With padding, `selection_gate` needs the attention implementation 'sdpa' or 'eager'.")

    kept_key = key
    kept_value = value
    kept_mask = mask
    if key_info.is_probed is None:
        num_kept = key.shape[2] - key_info.num_probed
        kept_key = key[:, :, :num_kept]
        kept_value = value[:, :, :num_kept]
        if mask is not None:
            kept_mask = mask[..., :num_kept]
    else:
        kept_mask = ~key_info.is_probed[:, None, None]  # (batch_size, 1, 1, num_keys)
        if mask is not None:
            kept_mask = kept_mask & mask
    attn_output, attn_weights = attention(module, query, kept_key, kept_value, kept_mask, **kwargs)
    attn_output = GateGradient.apply(
        attn_output, key_info.gate, query.detach(), key.detach(), value.detach(), mask, kwargs["scaling"]
    )
    return attn_output, attn_weights


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
        ctx.save_for_backward(states, scores)
        ctx.values = values
        return states.view_as(states), scores.new_zeros(len(scores))

    @staticmethod
    def backward(ctx, grad_states, grad_losses):
        states, scores = ctx.saved_tensors
        gradient_dot_state = (grad_states.to(scores.dtype) * states).sum(dim=-1)
        relevance = -gradient_dot_state[:, 1:].clamp(max=0)
        total = relevance.sum(dim=-1, keepdim=True)
        targets = relevance / total.clamp(min=torch.finfo(total.dtype).tiny)
        ctx.values.copy_(-(targets * log_scores(scores)).sum(dim=-1))
        grad_scores = -grad_losses[:, None] * targets / scores.clamp(min=LOWEST_SCORE)
        return grad_states, grad_scores, None
