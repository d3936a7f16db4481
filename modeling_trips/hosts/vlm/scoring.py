"""
Scorers of visual tokens: by the prompt, published methods by their names, at random, or by pooling.

The methods are written from their papers. `tests/hosts/test_scoring.py` compares them with slow references.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from ...patch_selection import gather_tokens, keep_topk


# (features, prompt, prompt mask, number of tokens to keep per image) -> (positions, features of the kept tokens)
# Features are the visual tokens after the connector, `(num_images, num_tokens, hidden_size)`, the prompt's input
# embeddings `(num_images, prompt_length, hidden_size)`. The mask is False at padding. Positions are ascending.
# A scorer with an argument `attention` also gets, by keyword, what the image's [CLS] (or the mean of its tokens)
# attends to in the last layer of the tower whose states the language model reads: `(num_images, num_tokens)`.
Scorer = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def unit_vectors(states: torch.Tensor) -> torch.Tensor:
    """Return vectors of length 1, float32 or wider: their products are cosines."""
    dtype = torch.promote_types(states.dtype, torch.float32)
    return nn.functional.normalize(states.to(dtype), dim=-1)


def select_by_prompt(
    features: torch.Tensor,
    prompt: torch.Tensor,
    prompt_mask: torch.Tensor,
    num_kept: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keep the tokens that are close to a word of the prompt and far from every closer token.

    The relevance of a token is its largest cosine with an embedding of the prompt, scaled to [0, 1] within the image.
    It is multiplied by the distance to the nearest token of higher relevance, as in density peaks clustering
    (https://doi.org/10.1126/science.1242072). With an empty prompt, only the distances count. One matrix product and
    one top-k: no loop over the kept tokens.
    """
    tokens = features.float()
    # The part that all tokens of an image share would dominate every cosine.
    shared = tokens.mean(dim=1, keepdim=True)  # (num_images, 1, hidden_size)
    directions = unit_vectors(tokens - shared)
    words = unit_vectors(prompt.float())
    # With an empty prompt, all tokens are equally relevant.
    cosines = directions @ words.transpose(1, 2)  # (num_images, num_tokens, prompt_length)
    cosines = cosines.masked_fill(~prompt_mask[:, None], -1.0)
    relevance = cosines.amax(dim=-1)  # (num_images, num_tokens)
    low, high = relevance.aminmax(dim=-1, keepdim=True)
    relevance = (relevance - low) / (high - low).clamp_min(1e-6)
    # 2 is the largest distance, for the most relevant token.
    distance = 1 - directions @ directions.transpose(1, 2)  # (num_images, num_tokens, num_tokens)
    relevance_of_row = relevance[:, :, None]
    relevance_of_column = relevance[:, None, :]
    is_earlier = torch.ones_like(distance, dtype=torch.bool).tril(diagonal=-1)
    is_tied = relevance_of_column == relevance_of_row
    is_above = (relevance_of_column > relevance_of_row) | (is_tied & is_earlier)
    distance_to_above = distance.masked_fill(~is_above, 2.0)
    separation = distance_to_above.amin(dim=-1)  # (num_images, num_tokens)
    scores = (relevance + 1e-3) * separation
    kept = keep_topk(scores, num_kept)
    return kept, gather_tokens(features, kept)


def select_by_divprune(
    features: torch.Tensor,
    prompt: torch.Tensor | None,
    prompt_mask: torch.Tensor | None,
    num_kept: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keep tokens that are far from each other (DivPrune, https://arxiv.org/abs/2503.02175). The prompt is not read.

    Distances are 1 minus the cosine. The first token is the one whose nearest other token is farthest; each next one
    is the token whose nearest kept token is farthest.
    """
    directions = unit_vectors(features.detach())
    distance = 1 - directions @ directions.transpose(1, 2)  # (num_images, num_tokens, num_tokens)
    distance = distance.nan_to_num(0.0)  # a faulty image still keeps as many tokens
    images = torch.arange(len(features), device=features.device)
    # The smallest distance of a token is that to itself.
    two_smallest = distance.topk(2, dim=-1, largest=False).values
    to_nearest_other = two_smallest[..., 1]  # (num_images, num_tokens)
    newest = to_nearest_other.argmax(dim=-1)  # (num_images,)
    chosen = [newest]
    to_nearest_kept = distance[images, newest]  # (num_images, num_tokens)
    for _ in range(num_kept - 1):
        to_nearest_kept = to_nearest_kept.scatter(1, newest[:, None], -1.0)  # no token is chosen twice
        newest = to_nearest_kept.argmax(dim=-1)
        chosen.append(newest)
        to_nearest_kept = to_nearest_kept.minimum(distance[images, newest])
    kept = torch.stack(chosen, dim=1)
    kept = kept.sort(dim=1).values  # (num_images, num_kept)
    return kept, gather_tokens(features, kept)


def choose_by_determinant(kernel: torch.Tensor, num_kept: int) -> torch.Tensor:
    """
    Return the tokens, ascending, that a greedy search for the largest determinant of their part of the kernel finds:
    `(num_images, num_tokens, num_tokens)` -> `(num_images, num_kept)`.

    Each step adds the token that multiplies the determinant most. A row of the Cholesky factor per kept token updates
    these gains (https://arxiv.org/abs/1709.05135), so no determinant is computed.
    """
    num_images, num_tokens, _ = kernel.shape
    images = torch.arange(num_images, device=kernel.device)
    gains = kernel.diagonal(dim1=1, dim2=2)  # (num_images, num_tokens)
    rows = kernel.new_zeros(num_images, num_kept, num_tokens)
    chosen = []
    for step in range(num_kept):
        newest = gains.argmax(dim=-1)  # (num_images,)
        chosen.append(newest)
        earlier = rows[:, :step]  # (num_images, step, num_tokens)
        earlier_of_newest = earlier[images, :, newest]  # (num_images, step)
        explained = (earlier_of_newest.unsqueeze(-1) * earlier).sum(dim=1)  # (num_images, num_tokens)
        rest = kernel[images, newest] - explained
        gain = gains[images, newest].unsqueeze(-1)  # rounding errors where the kept tokens span the features
        rows[:, step] = torch.where(gain > 1e-6, rest / gain.clamp(min=1e-6).sqrt(), 0.0)
        gains = gains - rows[:, step].square()
        gains = gains.scatter(1, newest[:, None], -torch.inf)
    return torch.stack(chosen, dim=1).sort(dim=1).values


def select_by_cdpruner(
    features: torch.Tensor,
    prompt: torch.Tensor,
    prompt_mask: torch.Tensor,
    num_kept: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keep tokens that are relevant to the prompt and different from each other: CDPruner
    (https://arxiv.org/abs/2506.10967), the greedy choice of a determinantal point process with the kernel
    relevance_i * cosine_ij * relevance_j.

    The relevance of a token is its mean cosine with the embeddings of the prompt, scaled to [0, 1] within the image.
    The authors' code for LLaVA takes the text tower of CLIP instead, with the opposite sign; other models have none.
    """
    directions = unit_vectors(features.detach())
    words = unit_vectors(prompt.detach())
    words = words * prompt_mask.unsqueeze(-1)  # (num_images, prompt_length, hidden_size)
    num_words = prompt_mask.sum(dim=-1, keepdim=True)
    num_words = num_words.clamp(min=1)
    cosines_with_words = directions @ words.transpose(1, 2)  # (num_images, num_tokens, prompt_length)
    relevance = cosines_with_words.sum(dim=-1) / num_words  # (num_images, num_tokens)
    low, high = relevance.aminmax(dim=-1, keepdim=True)
    # Above 0, so that the least relevant token still counts; 1 for all tokens with an empty prompt.
    relevance = (relevance - low + 1e-6) / (high - low).clamp_min(1e-6)
    cosines = directions @ directions.transpose(1, 2)
    # Rounding must not decide which of equally relevant tokens is the first.
    cosines.diagonal(dim1=1, dim2=2).fill_(1.0)
    kernel = relevance.unsqueeze(2) * cosines * relevance.unsqueeze(1)  # (num_images, num_tokens, num_tokens)
    kernel = kernel.nan_to_num(0.0)  # a faulty image still keeps as many tokens
    kept = choose_by_determinant(kernel, num_kept)
    return kept, gather_tokens(features, kept)


def select_by_vispruner(
    features: torch.Tensor,
    prompt: torch.Tensor | None,
    prompt_mask: torch.Tensor | None,
    num_kept: int,
    attention: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keep tokens that the image attends to, and as many that differ from each other (VisPruner,
    https://arxiv.org/abs/2412.01818). The prompt is not read. Tokens are compared after the connector, those of the
    authors before it.
    """
    directions = unit_vectors(features.detach())
    order = attention.argsort(dim=-1, descending=True)  # (num_images, num_tokens)
    num_attended = num_kept // 2
    num_distinct = num_kept - num_attended
    attended, others = order.tensor_split([num_attended], dim=1)
    while others.shape[1] > num_distinct:
        # The others are dealt into two halves. Up to 8 of the first leave, those nearest to a token of the second.
        first = others[:, ::2]
        second = others[:, 1::2]
        first_directions = gather_tokens(directions, first)
        second_directions = gather_tokens(directions, second)
        cosines = first_directions @ second_directions.transpose(1, 2)
        to_nearest = cosines.amax(dim=-1)  # (num_images, size of the first half)
        nearest_first = to_nearest.argsort(dim=-1, descending=True)
        num_dropped = min(8, others.shape[1] - num_distinct)
        distinct = first.gather(1, nearest_first[:, num_dropped:])
        others = torch.cat([distinct, second], dim=1)
    kept = torch.cat([attended, others], dim=1)
    kept = kept.sort(dim=1).values  # (num_images, num_kept)
    return kept, gather_tokens(features, kept)


def select_by_visionzip(
    features: torch.Tensor,
    prompt: torch.Tensor | None,
    prompt_mask: torch.Tensor | None,
    num_kept: int,
    attention: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keep tokens that the image attends to, and merge the others into a few of them (VisionZip,
    https://arxiv.org/abs/2412.04467). The prompt is not read. Of 64 tokens 10 are merged ones, as in the authors'
    settings. Others are compared and merged after the connector; the authors compare keys and merge before it.
    """
    num_merged = 5 * num_kept // 32
    order = attention.argsort(dim=-1, descending=True)  # (num_images, num_tokens)
    dominant, others = order.tensor_split([num_kept - num_merged], dim=1)
    kept_features = gather_tokens(features, dominant)
    if num_merged == 0:
        return dominant, kept_features
    others = others.sort(dim=1).values
    places = torch.arange(others.shape[1], device=others.device)
    step = others.shape[1] // num_merged
    is_target = (places % step == 0) & (places < step * num_merged)
    targets = others[:, is_target]  # (num_images, num_merged)
    sources = others[:, ~is_target]
    directions = unit_vectors(features.detach())
    source_directions = gather_tokens(directions, sources)
    target_directions = gather_tokens(directions, targets)
    cosines = source_directions @ target_directions.transpose(1, 2)
    nearest = nn.functional.one_hot(cosines.argmax(dim=-1), num_merged)  # (num_images, num_sources, num_merged)
    nearest = nearest.transpose(1, 2).to(features.dtype)
    counts = nearest.sum(dim=-1, keepdim=True).clamp(min=1)
    merged = gather_tokens(features, targets) + nearest @ gather_tokens(features, sources) / counts
    return torch.cat([dominant, targets], dim=1), torch.cat([kept_features, merged], dim=1)


def keep_changes(video: torch.Tensor, keep_rate: float) -> torch.Tensor:
    """
    Return a mask of a video's tokens that change: EVS (https://arxiv.org/abs/2510.14624), `(num_steps, num_tokens,
    hidden_size)` -> `(num_steps, num_tokens)`.

    The first step stays whole. Of the others, those tokens stay whose cosine with the token of the same place one step
    before is smallest, until `keep_rate` of the video is kept.
    """
    num_steps, num_tokens, _ = video.shape
    change = 1 - nn.functional.cosine_similarity(video[1:], video[:-1], dim=-1)
    change = nn.functional.pad(change, (0, 0, 1, 0), value=torch.inf)
    change = change.flatten()  # (num_steps * num_tokens,)
    order = change.argsort(descending=True, stable=True)
    num_kept = int(len(change) * keep_rate)
    num_kept = max(num_kept, num_tokens)
    is_kept = torch.zeros_like(change, dtype=torch.bool)
    is_kept[order[:num_kept]] = True
    return is_kept.view(num_steps, num_tokens)


def select_at_random(
    features: torch.Tensor,
    prompt: torch.Tensor,
    prompt_mask: torch.Tensor,
    num_kept: int,
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
    rows = math.isqrt(num_kept)
    while num_kept % rows > 0:
        rows -= 1
    columns = num_kept // rows
    if columns > side:
        raise ValueError(f"{num_kept} cells do not fit a grid of {side} x {side} visual tokens.")
    return side, rows, columns


def pool(
    features: torch.Tensor,
    prompt: torch.Tensor,
    prompt_mask: torch.Tensor,
    num_kept: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the tokens of a square grid over `num_kept` cells, at the position of each middle token. A control."""
    side, rows, columns = pooling_cells(features.shape[1], num_kept)
    grid = features.transpose(1, 2).unflatten(2, (side, side))  # (num_images, hidden_size, side, side)
    cells = nn.functional.adaptive_avg_pool2d(grid, (rows, columns))
    pooled = cells.flatten(2).transpose(1, 2)  # (num_images, num_kept, hidden_size)
    row_of_cell = middles(rows, side)  # (rows,)
    column_of_cell = middles(columns, side)  # (columns,)
    positions = row_of_cell[:, None] * side + column_of_cell  # (rows, columns)
    positions = positions.flatten().to(features.device)
    positions = positions.expand(len(features), -1)  # (num_images, num_kept)
    return positions, pooled


def middles(num_parts: int, side: int) -> torch.Tensor:
    """Return the middle place of each of equal parts of a side: `(num_parts,)`."""
    centers = torch.arange(num_parts) + 0.5
    return (centers * side / num_parts).long()


SCORERS: dict[str, Scorer] = {
    "divprune": select_by_divprune,
    "prompt": select_by_prompt,
    "cdpruner": select_by_cdpruner,
    "vispruner": select_by_vispruner,
    "visionzip": select_by_visionzip,
    "random": select_at_random,
    "pooling": pool,
}
EVS = "evs"  # for videos: see `keep_changes`
READ_PROMPT = ("prompt", "cdpruner")
