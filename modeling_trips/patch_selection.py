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

The functions never form a full attention map. Shapes depend on shapes and rates only, and nothing syncs with the host.
"""

import math

import torch


FUSED_TOKEN = -1  # index of a candidate that is not a patch


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
    logits = (key.to(dtype) * (query.to(dtype) * scaling).unsqueeze(2)).sum(dim=-1)
    return logits.softmax(dim=-1).mean(dim=1)


def random_scores(
    batch_size: int, num_candidates: int, training: bool, device: torch.device, seed: int = 0
) -> torch.Tensor:
    """
    Return random scores, the baseline of every guidance.

    In training they come from PyTorch's global generator. In evaluation they are one fixed pseudo-random sequence per
    `seed`: all images and texts, in any batch, keep the same set of patches.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_candidates)`, float32. Each row is positive and sums to 1.
    """
    if training:
        scores = torch.rand(batch_size, num_candidates, device=device)
    else:
        # A hash by hand: the numbers of a `torch.Generator` differ between devices, and a graph cannot hold one.
        position = torch.arange(1, num_candidates + 1, device=device, dtype=torch.int64)
        prime = 2**31 - 1  # a multiplicative hash, twice; the products stay within 64 bits
        mixed = (position * 1103515245 + seed * 12345677) % prime
        mixed = ((mixed ^ (mixed >> 15)) * 1664525) % prime
        scores = ((mixed >> 7).float() / 2**24).expand(batch_size, num_candidates)
    scores = scores + 1e-6
    return scores / scores.sum(dim=-1, keepdim=True)


def keep_topk(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """
    Return the positions of the `num_kept` largest scores, in ascending order: `(batch_size, num_candidates)` ->
    `(batch_size, num_kept)`. Of equal scores the lower position wins. NaN ranks last.
    """
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    lowest_kept = scores.topk(num_kept, dim=-1).values[:, -1:]
    # ONNX has no stable sort.
    above, ties = scores > lowest_kept, scores == lowest_kept
    num_ties_kept = num_kept - above.sum(dim=-1, keepdim=True)
    kept = above | (ties & (ties.long().cumsum(dim=-1) <= num_ties_kept))
    last = scores.shape[1] - 1
    positions = torch.arange(last + 1, device=scores.device)
    return positions.where(kept, last).sort(dim=-1).values[:, :num_kept]


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
