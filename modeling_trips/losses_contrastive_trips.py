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
The losses that pull a text and its image together and push others away, as pure functions that know no model:
contrastive (ITC) over the batch of all processes, matching (ITM) on hard negatives drawn in the batch of each.

Below them, how processes that train together see the rows of all; one process alone communicates nothing.

"The same image" always means an equal image id, so that the captions of one image, and an image that is in the batch
twice, are never taken for negatives.
"""

from typing import NamedTuple

import torch
from torch import distributed, nn
from transformers.utils.generic import maybe_autocast

from .losses_trips import mean_count, num_processes


LOWEST_LOGIT = -1e9  # not minus infinity, which times a target of 0 is no number


class MatchingPairs(NamedTuple):
    """
    Pairs to tell apart, made from T true ones: those, then each text with another image, then each image with another
    text. Each field has `3 * T` entries.
    """

    text_index: torch.LongTensor  # the pair's text
    image_index: torch.LongTensor  # the pair's image, named by the true pair that it comes from
    labels: torch.LongTensor  # 1 for a true pair, 0 for a negative one
    weights: torch.FloatTensor  # 0 where the batch holds no negative, 1 elsewhere


def similarity(
    queries: torch.Tensor, candidates: torch.Tensor, temperature: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """
    Dot products of every query with every candidate, divided by the temperature, in full precision: autocast would
    round them, and a small temperature would blow that up.

    Args:
        queries (`torch.Tensor` of shape `(num_queries, dim)`), candidates (`torch.Tensor` of shape `(num_candidates,
            dim)`): usually normalised.
        temperature (`float` or `torch.Tensor` of one element, *optional*, defaults to 1.0)

    Returns:
        `torch.Tensor` of shape `(num_queries, num_candidates)`, float32 or wider.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with maybe_autocast(queries.device.type, enabled=False):
        return queries.to(dtype) @ candidates.to(dtype).T / temperature


def contrastive_targets(query_ids: torch.LongTensor, candidate_ids: torch.LongTensor) -> torch.FloatTensor:
    """
    Which candidates a query should find: those of the same image, in equal shares.

    Args:
        query_ids (`torch.LongTensor` of shape `(num_queries,)`), candidate_ids (`torch.LongTensor` of shape
            `(num_candidates,)`): image ids.

    Returns:
        `torch.FloatTensor` of shape `(num_queries, num_candidates)`, float32. A row sums to 1, or to 0 if no candidate
        is of the query's image.
    """
    same_image = (query_ids[:, None] == candidate_ids).float()
    return same_image / same_image.sum(dim=-1, keepdim=True).clamp_min(1.0)


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    temperature: float | torch.Tensor,
    image_ids: torch.LongTensor,
    text_image_ids: torch.LongTensor,
) -> torch.Tensor:
    """
    Image-text contrastive loss (ITC): the mean of the cross-entropies of images that look for their texts and of texts
    that look for their images.

    With several processes, each looks among the images and texts of all, and its loss is the sum over its own rows,
    divided by the mean number of rows of a process. The mean of the processes' losses and gradients, as data parallel
    training takes it, is then that of one process with the whole batch, also if one has more images than another.

    Args:
        image_embeds (`torch.Tensor` of shape `(num_images, dim)`), text_embeds (`torch.Tensor` of shape `(num_texts,
            dim)`): normalised.
        temperature (`float` or `torch.Tensor` of one element)
        image_ids (`torch.LongTensor` of shape `(num_images,)`), text_image_ids (`torch.LongTensor` of shape
            `(num_texts,)`): which image each one is, or belongs to. An image without a text adds nothing of its own.

    Returns:
        `torch.Tensor` of shape `()`, float32 or wider.
    """
    image_counts, text_counts = row_counts(image_ids, text_image_ids)
    all_images, all_image_ids = (gather_with_gradient(rows, image_counts) for rows in (image_embeds, image_ids))
    all_texts, all_text_image_ids = (gather_with_gradient(rows, text_counts) for rows in (text_embeds, text_image_ids))
    logits_per_image = similarity(image_embeds, all_texts, temperature)
    logits_per_text = similarity(text_embeds, all_images, temperature)
    loss_per_image = _soft_cross_entropy(logits_per_image, contrastive_targets(image_ids, all_text_image_ids))
    loss_per_text = _soft_cross_entropy(logits_per_text, contrastive_targets(text_image_ids, all_image_ids))
    image_share, text_share = len(image_ids) / len(all_image_ids), len(text_image_ids) / len(all_text_image_ids)
    return num_processes() * (image_share * loss_per_image + text_share * loss_per_text) / 2


def distilled_loss(
    queries: torch.Tensor,
    teacher_queries: torch.Tensor,
    query_ids: torch.LongTensor,
    candidates: torch.Tensor,
    candidate_ids: torch.LongTensor,
    temperature: float | torch.Tensor,
    teacher_weight: float,
) -> torch.Tensor:
    """
    One direction of ITC with a momentum teacher (ALBEF, equation 6): queries look for their partners among the
    teacher's features, and the targets are part `contrastive_targets`, part what the teacher's own queries find.

    Args:
        queries, teacher_queries (`torch.Tensor` of shape `(num_queries, dim)`): normalised.
        query_ids (`torch.LongTensor` of shape `(num_queries,)`), candidate_ids (`torch.LongTensor` of shape
            `(num_candidates,)`): image ids. A candidate of id -1 is none: it is left out.
        candidates (`torch.Tensor` of shape `(num_candidates, dim)`): normalised, without gradient.
        temperature (`float` or `torch.Tensor` of one element)
        teacher_weight (`float`): share of the teacher in the targets (ALBEF's alpha).

    Returns:
        `torch.Tensor` of shape `()`, float32 or wider.
    """
    absent = candidate_ids == -1
    logits = similarity(queries, candidates, temperature).masked_fill(absent, LOWEST_LOGIT)
    teacher_logits = similarity(teacher_queries, candidates, temperature).masked_fill(absent, LOWEST_LOGIT)
    guesses = teacher_logits.detach().softmax(dim=-1)
    targets = teacher_weight * guesses + (1.0 - teacher_weight) * contrastive_targets(query_ids, candidate_ids)
    return _soft_cross_entropy(logits, targets)


def _soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits, targets.to(logits.dtype))


def hard_negative_indices(
    logits: torch.Tensor, same_image: torch.BoolTensor, generator: torch.Generator | None = None
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """
    One negative for each query, drawn from the softmax of its logits over the candidates of other images.

    The draw is the largest sum of logit and Gumbel noise, which has that distribution. Unlike `torch.multinomial` it
    works with probabilities that are too small for a float, and never waits for the device.

    Args:
        logits (`torch.Tensor` of shape `(num_queries, num_candidates)`)
        same_image (`torch.BoolTensor` of shape `(num_queries, num_candidates)`): candidates that are never drawn.
        generator (`torch.Generator`, *optional*): by default PyTorch's global one.

    Returns:
        The drawn candidates, a `torch.LongTensor` of shape `(num_queries,)`, and whether each of them is a negative, a
        `torch.BoolTensor` of that shape. It is not where all candidates are of the same image: mask that row's loss.
    """
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    noisy_logits = (logits.detach() + noise).masked_fill(same_image, float("-inf"))
    return noisy_logits.argmax(dim=-1), ~same_image.all(dim=-1)


def matching_pairs(
    logits: torch.Tensor, image_ids: torch.LongTensor, generator: torch.Generator | None = None
) -> MatchingPairs:
    """
    The pairs of image-text matching (ITM): for each of T true pairs, that pair, its text with a hard negative image
    and its image with a hard negative text. The number of pairs is always the same.

    Args:
        logits (`torch.Tensor` of shape `(T, T)`): entry (i, j) says how well the text of pair i fits the image of pair
            j. An image that is in several pairs can be drawn as each of them.
        image_ids (`torch.LongTensor` of shape `(T,)`): which image each pair has.
        generator (`torch.Generator`, *optional*): by default PyTorch's global one.

    Returns:
        [`MatchingPairs`].
    """
    same_image = image_ids[:, None] == image_ids
    negative_images, found = hard_negative_indices(logits, same_image, generator)
    negative_texts, _ = hard_negative_indices(logits.T, same_image, generator)  # found for the same rows
    true_pairs = torch.arange(len(image_ids), device=logits.device)
    ones = torch.ones_like(true_pairs)
    return MatchingPairs(
        text_index=torch.cat((true_pairs, true_pairs, negative_texts)),
        image_index=torch.cat((true_pairs, negative_images, true_pairs)),
        labels=torch.cat((ones, 0 * ones, 0 * ones)),
        weights=torch.cat((ones.bool(), found, found)).float(),
    )


def matching_loss(logits: torch.Tensor, labels: torch.LongTensor, weights: torch.Tensor) -> torch.Tensor:
    """
    Image-text matching loss (ITM): weighted mean of the cross-entropies of the pairs, of all processes' pairs if there
    are several.

    Args:
        logits (`torch.Tensor` of shape `(num_pairs, 2)`): column 1 speaks for a match.
        labels (`torch.LongTensor` of shape `(num_pairs,)`), weights (`torch.Tensor` of shape `(num_pairs,)`): see
            [`MatchingPairs`].

    Returns:
        `torch.Tensor` of shape `()`, float32 or wider.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return (losses * weights).sum() / mean_count(weights.sum())


def row_counts(*tensors: torch.Tensor) -> list[list[int]]:
    """For each of the tensors how many rows the processes have, in the order of their ranks. The host waits for it."""
    counts = [len(tensor) for tensor in tensors]
    if num_processes() == 1:
        return [[count] for count in counts]
    return torch.stack(_gather(torch.tensor(counts, device=tensors[0].device)), dim=1).tolist()


def gather_with_gradient(tensor: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """
    The rows of all processes, in the order of their ranks; with one process, `tensor` itself. Each process gets the
    gradient that its rows have in the losses of all.

    Args:
        tensor (`torch.Tensor` of shape `(num_rows, ...)`)
        counts (`list[int]`): the number of rows of each process, see `row_counts`.

    Returns:
        `torch.Tensor` of shape `(sum(counts), ...)`.
    """
    return _GatherWithGradient.apply(tensor, counts) if num_processes() > 1 else tensor


class _GatherWithGradient(torch.autograd.Function):
    """`torch.distributed.nn` has one too, but deprecated, and its successor is private."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.counts = counts
        padding = tensor.new_empty(max(counts) - len(tensor), *tensor.shape[1:])
        gathered = _gather(torch.cat((tensor, padding)))
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # reduced in place, and not ours
        distributed.all_reduce(gradient)
        return gradient.split(ctx.counts)[distributed.get_rank()], None


def _gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all processes, of one shape."""
    gathered = [torch.empty_like(tensor) for _ in range(num_processes())]
    distributed.all_gather(gathered, tensor)
    return gathered


def distinct_image_ids(num_images: int, device: torch.device) -> torch.LongTensor:
    """
    Image ids for a batch in which no image is twice, in this process or in another.

    Returns:
        `torch.LongTensor` of shape `(num_images,)`.
    """
    rank = distributed.get_rank() if num_processes() > 1 else 0
    return torch.arange(num_images, device=device) * num_processes() + rank


def check_captions(
    text_states: torch.Tensor,
    num_images: int,
    image_index: torch.LongTensor | None,
    image_ids: torch.LongTensor | None,
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """`image_index` and `image_ids` for the losses, with their defaults."""
    num_texts, device = len(text_states), text_states.device
    if image_index is None and num_texts != num_images:
        raise ValueError(
            f"Got {num_texts} texts for {num_images} images. Give as many images as texts, or say with `image_index` "
            "which image each text is a caption of."
        )
    for name, value, count in (("image_index", image_index, num_texts), ("image_ids", image_ids, num_images)):
        if value is not None and tuple(value.shape) != (count,):
            raise ValueError(f"`{name}` must have shape ({count},), got {tuple(value.shape)}.")
    if image_index is None:
        image_index = torch.arange(num_texts, device=device)
    if image_ids is None:
        image_ids = distinct_image_ids(num_images, device)
    return image_index.to(device), image_ids.to(device)
