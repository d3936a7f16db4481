"""Scorers of visual tokens: by the prompt, by diversity, at random, or by pooling."""

import math
from collections.abc import Callable

import torch
from torch import nn

from ...patch_selection import gather_tokens, keep_topk


# (features, prompt, prompt mask, number of tokens to keep per image) -> (positions, features of the kept tokens)
# Features are the visual tokens after the connector, `(num_images, num_tokens, hidden_size)`, the prompt's input
# embeddings `(num_images, prompt_length, hidden_size)`. The mask is False at padding. Positions are ascending.
Scorer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def centered_directions(features: torch.Tensor) -> torch.Tensor:
    """
    Return the features as float32 unit vectors after their mean over the image is subtracted. Otherwise the part that
    all tokens of an image share dominates every cosine.
    """
    features = features.float()
    return nn.functional.normalize(features - features.mean(dim=1, keepdim=True), dim=-1)


def select_by_prompt(
    features: torch.Tensor, prompt: torch.Tensor, prompt_mask: torch.Tensor, num_kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keep the tokens that are close to a word of the prompt and far from every closer token.

    The relevance of a token is its largest cosine with an embedding of the prompt, scaled to [0, 1] within the image.
    It is multiplied by the distance to the nearest token of higher relevance, as in density peaks clustering
    (https://doi.org/10.1126/science.1242072). With an empty prompt, only the distances count. One matrix product and
    one top-k: no loop over the kept tokens.
    """
    directions = centered_directions(features)
    words = nn.functional.normalize(prompt.float(), dim=-1)
    # With an empty prompt, all tokens are equally relevant.
    cosines = (directions @ words.transpose(1, 2)).masked_fill(~prompt_mask[:, None], -1.0)
    relevance = cosines.amax(dim=-1)
    low, high = relevance.aminmax(dim=-1, keepdim=True)
    relevance = (relevance - low) / (high - low).clamp_min(1e-6)
    # 2 is the largest distance, for the most relevant token.
    distance = 1 - directions @ directions.transpose(1, 2)
    own, other = relevance[:, :, None], relevance[:, None, :]
    is_earlier = torch.ones_like(distance, dtype=torch.bool).tril(diagonal=-1)
    is_above = (other > own) | ((other == own) & is_earlier)
    separation = distance.masked_fill(~is_above, 2.0).amin(dim=-1)
    kept = keep_topk((relevance + 1e-3) * separation, num_kept)
    return kept, gather_tokens(features, kept)


def select_diverse(
    features: torch.Tensor, prompt: torch.Tensor, prompt_mask: torch.Tensor, num_kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keep tokens that are far from each other: the farthest from the mean first, then the token with the largest
    distance to its nearest kept token (DivPrune, https://arxiv.org/abs/2503.02175). A control without the prompt.
    """
    directions = centered_directions(features)
    images = torch.arange(len(features), device=features.device)
    chosen = [(features.float() - features.float().mean(dim=1, keepdim=True)).norm(dim=-1).argmax(dim=-1)]
    nearest = features.new_full(features.shape[:2], math.inf, dtype=torch.float32)
    for _ in range(num_kept - 1):
        newest = directions[images, chosen[-1]]
        # `fmin` ignores NaN, so that no token is chosen twice.
        nearest = nearest.fmin(1 - (directions @ newest.unsqueeze(-1)).squeeze(-1))
        nearest[images, chosen[-1]] = -1.0
        chosen.append(nearest.argmax(dim=-1))
    kept = torch.stack(chosen, dim=1).sort(dim=1).values
    return kept, gather_tokens(features, kept)


def select_at_random(
    features: torch.Tensor, prompt: torch.Tensor, prompt_mask: torch.Tensor, num_kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep random tokens, drawn from PyTorch's global generator. A control."""
    kept = keep_topk(torch.rand(features.shape[:2], device=features.device), num_kept)
    return kept, gather_tokens(features, kept)


def pooling_cells(num_tokens: int, num_kept: int) -> tuple[int, int, int]:
    """
    Return the side of the grid of visual tokens, and the cells down and across that pool it. Raise a ValueError if the
    tokens are not a square grid or the cells do not fit it.
    """
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"Pooling needs a square grid of visual tokens, got {num_tokens} tokens.")
    rows = max(divisor for divisor in range(1, math.isqrt(num_kept) + 1) if num_kept % divisor == 0)
    columns = num_kept // rows
    if columns > side:
        raise ValueError(f"{num_kept} cells do not fit a grid of {side} x {side} visual tokens.")
    return side, rows, columns


def pool(
    features: torch.Tensor, prompt: torch.Tensor, prompt_mask: torch.Tensor, num_kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the tokens of a square grid over `num_kept` cells, at the position of each middle token. A control."""
    side, rows, columns = pooling_cells(features.shape[1], num_kept)
    grid = features.transpose(1, 2).unflatten(2, (side, side))
    pooled = nn.functional.adaptive_avg_pool2d(grid, (rows, columns)).flatten(2).transpose(1, 2)
    row = ((torch.arange(rows) + 0.5) * side / rows).long()
    column = ((torch.arange(columns) + 0.5) * side / columns).long()
    middle = (row[:, None] * side + column).flatten().to(features.device)
    return middle.expand(len(features), -1), pooled


SCORERS: dict[str, Scorer] = {
    "prompt": select_by_prompt,
    "diversity": select_diverse,
    "random": select_at_random,
    "pooling": pool,
}
