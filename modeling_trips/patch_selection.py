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
The patch selection of TRIPS (https://arxiv.org/abs/2403.07883, section 3.2) as pure functions: score, keep, fuse.

The functions never form a full attention map. Shapes depend on shapes and rates only and nothing syncs with the host,
except in `select_mass`, whose number of tokens depends on the scores.
"""

import math

import torch


# Indices of candidates that are not patches.
FUSED_TOKEN, PADDING = -1, -2
ROUNDING = 1e-6  # tolerance for products and sums in floating point


def num_kept_tokens(num_candidates: int, keep_rate: float) -> int:
    """
    Return the number of kept candidates: `ceil(keep_rate * num_candidates)`, at least 1.

    The product is lowered by 1e-6 first: 0.1 of 30 is 3, although `0.1 * 30 > 3` in floating point.
    """
    return max(1, math.ceil(keep_rate * num_candidates - ROUNDING))


def num_kept_by_row(num_candidates: torch.LongTensor, keep_rate: float) -> torch.LongTensor:
    """
    Return `num_kept_tokens` of each number in a tensor.

    It computes in fixed point, since float32 is too coarse and not all devices have float64.
    """
    unit = 2**40
    num_kept = num_candidates * round(keep_rate * unit) - round(ROUNDING * unit)
    return (num_kept + unit - 1).div(unit, rounding_mode="floor").clamp(min=1)


def score_tokens(
    query: torch.Tensor, key: torch.Tensor, scaling: float, candidate_mask: torch.BoolTensor | None = None
) -> torch.Tensor:
    """
    Return the attention of one guiding token to each candidate, averaged over the heads.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, head_dim)`): The guiding token's query.
        key (`torch.Tensor` of shape `(batch_size, num_heads, num_candidates, head_dim)`): The candidates' keys.
        scaling (`float`): Factor of the dot products, usually `head_dim ** -0.5`.
        candidate_mask (`torch.BoolTensor` of shape `(batch_size, num_candidates)`, *optional*): False marks padding.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_candidates)`, float32 or wider. Each row is positive and sums to 1;
        padding has 0.
    """
    # A product and a sum, since autocast would lower the precision of a matmul and rounding would tie patches.
    dtype = torch.promote_types(key.dtype, torch.float32)
    logits = (key.to(dtype) * (query.to(dtype) * scaling).unsqueeze(2)).sum(dim=-1)
    if candidate_mask is not None:
        logits = logits.masked_fill(~candidate_mask[:, None], -math.inf)
    return logits.softmax(dim=-1).mean(dim=1)


def random_scores(
    batch_size: int,
    num_candidates: int,
    training: bool,
    device: torch.device,
    seed: int = 0,
    candidate_mask: torch.BoolTensor | None = None,
) -> torch.Tensor:
    """
    Return random scores, the baseline of every guidance.

    In training they come from PyTorch's global generator. In evaluation they are a fixed pseudo-random sequence, the
    same for each row, that depends on `seed` but not on the batch or the generator. Padding, where `candidate_mask` is
    False, is not counted and has the score 0.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_candidates)`, float32. Each row is positive and sums to 1.
    """
    if training:
        scores = torch.rand(batch_size, num_candidates, device=device)
    else:
        position = torch.arange(1, num_candidates + 1, device=device, dtype=torch.int64)
        if candidate_mask is not None:
            position = candidate_mask.long().cumsum(dim=-1)
        prime = 2**31 - 1  # a multiplicative hash, twice; the products stay within 64 bits
        mixed = (position * 1103515245 + seed * 12345677) % prime
        mixed = ((mixed ^ (mixed >> 15)) * 1664525) % prime
        scores = ((mixed >> 7).float() / 2**24).expand(batch_size, num_candidates)
    scores = scores + 1e-6
    if candidate_mask is not None:
        scores = scores * candidate_mask
    return scores / scores.sum(dim=-1, keepdim=True)


def keep_topk(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """
    Return the positions of the `num_kept` largest scores, in ascending order: `(batch_size, num_candidates)` ->
    `(batch_size, num_kept)`. Of equal scores the lower position wins. NaN ranks last.
    """
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    lowest_kept = scores.topk(num_kept, dim=-1).values[:, -1:]
    kept = _are_kept(scores, lowest_kept, num_kept)
    last = scores.shape[1] - 1
    positions = torch.arange(last + 1, device=scores.device)
    return positions.where(kept, last).sort(dim=-1).values[:, :num_kept]


def _are_kept(scores: torch.Tensor, lowest_kept: torch.Tensor, num_kept: int | torch.LongTensor) -> torch.BoolTensor:
    """Return a mask of the `num_kept` largest scores, of which `lowest_kept` is the least; the first of equal ones."""
    # ONNX has no stable sort.
    above, ties = scores > lowest_kept, scores == lowest_kept
    num_ties_kept = num_kept - above.sum(dim=-1, keepdim=True)
    return above | (ties & (ties.long().cumsum(dim=-1) <= num_ties_kept))


def keep_mass(
    scores: torch.Tensor,
    mass: float,
    keep_rate: float,
    min_keep_rate: float = 0.0,
    candidate_mask: torch.BoolTensor | None = None,
) -> torch.BoolTensor:
    """
    Return a mask of the smallest set of candidates whose scores sum to at least `mass` (top-p selection). Of equal
    scores the lower position wins.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, num_candidates)`): Each row is positive and sums to 1.
        mass (`float`): In (0, 1], with a tolerance of 1e-6. 1.0 keeps all candidates.
        keep_rate, min_keep_rate (`float`): Bounds of the share of the row's candidates, see `num_kept_tokens`.
        candidate_mask (`torch.BoolTensor` of shape `(batch_size, num_candidates)`, *optional*): False marks padding,
            which is not kept.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, num_candidates)`.
    """
    if candidate_mask is None:
        candidate_mask = torch.ones_like(scores, dtype=torch.bool)
    # A row of NaN keeps its first candidates. Padding is below a score that is rounded to 0.
    scores = scores.detach().masked_fill(scores.isnan(), 0.0).masked_fill(~candidate_mask, -1.0)
    largest_first = scores.sort(dim=-1, descending=True).values
    sums = largest_first.clamp(min=0).cumsum(dim=-1)
    num_kept = 1 + (sums < (mass - ROUNDING if mass < 1 else math.inf)).sum(dim=-1, keepdim=True)
    num_candidates = candidate_mask.sum(dim=-1, keepdim=True)
    num_kept = num_kept.minimum(num_kept_by_row(num_candidates, keep_rate))
    num_kept = num_kept.maximum(num_kept_by_row(num_candidates, min_keep_rate))
    return _are_kept(scores, largest_first.gather(1, num_kept - 1), num_kept)


def gather_tokens(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """
    Return the tokens at `positions`: `(batch_size, num_tokens, hidden_size)` and `(batch_size, num_kept)` ->
    `(batch_size, num_kept, hidden_size)`.
    """
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def fuse_tokens(
    tokens: torch.Tensor, scores: torch.Tensor, kept_positions: torch.Tensor, normalize: bool = False
) -> torch.Tensor:
    """
    Return the fused token: the sum of the tokens that are not kept, weighted by their scores.

    Top-k has no gradient. The scores, and through them the guiding text, get their gradient from this sum.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, num_candidates, hidden_size)`)
        scores (`torch.Tensor` of shape `(batch_size, num_candidates)`)
        kept_positions (`torch.LongTensor` of shape `(batch_size, num_kept)`)
        normalize (`bool`, *optional*, defaults to `False`): Whether the weights are rescaled to sum to 1.

    Returns:
        `torch.Tensor` of shape `(batch_size, 1, hidden_size)`, in the dtype of `tokens`.
    """
    weights = scores.scatter(1, kept_positions, 0.0)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return torch.bmm(weights.to(tokens.dtype).unsqueeze(1), tokens).to(tokens.dtype)


def select_tokens(
    tokens: torch.Tensor,
    scores: torch.Tensor,
    keep_rate: float,
    fuse: bool = True,
    normalize: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Shorten a sequence of p other tokens (here [CLS]) and n candidates to these p, the k kept candidates in their
    original order and, with `fuse`, one token for the rest.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, p + n, hidden_size)`)
        scores (`torch.Tensor` of shape `(batch_size, n)`)
        keep_rate (`float`): Share of the candidates to keep, in (0, 1].
        fuse (`bool`, *optional*, defaults to `True`): Whether the others become one token, or are dropped.
        normalize (`bool`, *optional*, defaults to `False`): Whether its weights are rescaled to sum to 1.

    Returns:
        The tokens, of shape `(batch_size, p + k + 1, hidden_size)` (`p + k` without `fuse`), and the positions of the
        kept candidates, a `torch.LongTensor` of shape `(batch_size, k)`. If all are kept, `tokens` are returned
        unchanged, without a fused token.
    """
    num_candidates = scores.shape[1]
    num_kept = num_kept_tokens(num_candidates, keep_rate)
    if num_kept == num_candidates:
        return tokens, torch.arange(num_candidates, device=scores.device).expand(scores.shape)
    others, candidates = tokens.split((tokens.shape[1] - num_candidates, num_candidates), dim=1)
    kept_positions = keep_topk(scores, num_kept)
    parts = [others, gather_tokens(candidates, kept_positions)]
    if fuse:
        parts.append(fuse_tokens(candidates, scores, kept_positions, normalize))
    return torch.cat(parts, dim=1), kept_positions


def _longest_row(kept: torch.BoolTensor, most: int) -> int:
    """
    Return the largest number of kept candidates of a row, which takes one sync with the host. Under `torch.compile`
    and `torch.export` and on the meta device it is `most`, the upper bound, so that shapes are static.
    """
    if torch.compiler.is_compiling() or kept.is_meta:
        return most
    return int(kept.sum(dim=-1).max())


def select_mass(
    tokens: torch.Tensor,
    scores: torch.Tensor,
    mass: float,
    keep_rate: float,
    min_keep_rate: float = 0.0,
    fuse: bool = True,
    normalize: bool = False,
    candidate_mask: torch.BoolTensor | None = None,
) -> tuple[torch.Tensor, torch.LongTensor, torch.BoolTensor]:
    """
    As `select_tokens`, with the candidates that `keep_mass` selects in each row. The longest row keeps k; the others
    are padded before the fused token, which is padding too in a row that keeps all candidates.

    Args:
        tokens (`torch.Tensor` of shape `(batch_size, p + n, hidden_size)`)
        scores (`torch.Tensor` of shape `(batch_size, n)`)
        mass, keep_rate, min_keep_rate, candidate_mask: As in `keep_mass`.
        fuse, normalize: As in `select_tokens`.

    Returns:
        The tokens, of shape `(batch_size, p + k + 1, hidden_size)` (`p + k` without `fuse`); the positions of the kept
        candidates, a `torch.LongTensor` of shape `(batch_size, k)`, where padding repeats the row's first; and a
        `torch.BoolTensor` that is False at padding among the tokens after the first p.
    """
    num_candidates = scores.shape[1]
    kept = keep_mass(scores, mass, keep_rate, min_keep_rate, candidate_mask)
    longest = _longest_row(kept, num_kept_tokens(num_candidates, keep_rate))
    positions = torch.arange(num_candidates, device=scores.device).where(kept, num_candidates)
    positions = positions.sort(dim=-1).values[:, :longest]
    mask = positions < num_candidates
    kept_positions = positions.where(mask, positions[:, :1])
    others, candidates = tokens.split((tokens.shape[1] - num_candidates, num_candidates), dim=1)
    parts = [others, gather_tokens(candidates, kept_positions)]
    if fuse:
        parts.append(fuse_tokens(candidates, scores, kept_positions, normalize))
        is_left = ~kept if candidate_mask is None else candidate_mask & ~kept
        mask = torch.cat((mask, is_left.any(dim=-1, keepdim=True)), dim=1)
    return torch.cat(parts, dim=1), kept_positions, mask
