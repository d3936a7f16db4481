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
Retrieval and pre-training: the contrastive model with matching, its losses over the batch of all processes, and the
pre-training objectives.

Images with equal ids are the same image. The captions of one image are never negatives of each other, even if the
image is in the batch twice.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import distributed, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import maybe_autocast

from .configuration_trips import SelectionSchedule, TripsConfig
from .modeling_trips import TripsModel, TripsModelOutput, TripsWritingModel, label_loss, weighted_sum
from .modeling_trips_text import TripsLMHead
from .modeling_trips_vision import (
    SHARED_ARGS,
    TripsImageCache,
    TripsPreTrainedModel,
    TripsSelection,
    TripsVisionModelOutput,
    check_counts,
    check_shape,
    class_states,
    select_rows,
)
from .pipeline_trips_retrieval import TripsZeroShotImageClassificationPipeline


# Losses


def num_processes() -> int:
    """Return the number of processes, 1 without `torch.distributed`."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def mean_count(count: torch.Tensor) -> torch.Tensor:
    """
    Return the mean number of items per process, for a total of at least one item.

    Each process divides the sum over its items by it. The mean of these losses over the processes, which data parallel
    training takes, is then the mean over all items, also if processes have different numbers of items.
    """
    if num_processes() == 1:
        return count.clamp_min(1)
    total = count.clone()
    distributed.all_reduce(total)
    return total.clamp_min(1) / num_processes()


LOWEST_LOGIT = -1e9  # minus infinity times a target of 0 would be NaN


class MatchingPairs(NamedTuple):
    """
    Pairs of image-text matching: T true pairs, then each text with a negative image, then each image with a negative
    text. Each field has `3 * T` entries.
    """

    text_index: torch.LongTensor  # the pair's text
    image_index: torch.LongTensor  # the true pair that the pair's image comes from
    labels: torch.LongTensor  # 1 for a true pair, 0 for a negative one
    weights: torch.FloatTensor  # 0 where the batch holds no negative, 1 elsewhere


def similarity(queries: torch.Tensor, candidates: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """
    Return the dot products of every query with every candidate, divided by the temperature: `(num_queries, dim)` and
    `(num_candidates, dim)` -> `(num_queries, num_candidates)`, float32 or wider. Autocast is off, since a small
    temperature amplifies rounding errors.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with maybe_autocast(queries.device.type, enabled=False):
        return queries.to(dtype) @ candidates.to(dtype).T / temperature


def retrieval_loss(
    queries: torch.Tensor,
    query_ids: torch.LongTensor,
    candidates: torch.Tensor,
    candidate_ids: torch.LongTensor,
    temperature: float | torch.Tensor,
    teacher_queries: torch.Tensor | None = None,
    teacher_weight: float = 0.0,
) -> torch.Tensor:
    """
    Return one direction of ITC: the cross-entropy of retrieval. The targets of a query are equal shares for the
    candidates of its image. With a momentum teacher (ALBEF, equation 6), they are mixed with its distribution.

    Args:
        queries, teacher_queries (`torch.Tensor` of shape `(num_queries, dim)`), candidates (`torch.Tensor` of shape
            `(num_candidates, dim)`): Normalized features.
        query_ids, candidate_ids (`torch.LongTensor`): Their image ids. With a teacher, candidates with the id -1 are
            ignored.
        teacher_weight (`float`, *optional*, defaults to 0.0): Share of the teacher in the targets (ALBEF's alpha).
    """
    logits = similarity(queries, candidates, temperature)  # (num_queries, num_candidates)
    is_same_image = (query_ids[:, None] == candidate_ids).float()
    targets = is_same_image / is_same_image.sum(dim=-1, keepdim=True).clamp_min(1.0)
    if teacher_queries is not None:
        is_absent = candidate_ids == -1
        logits = logits.masked_fill(is_absent, LOWEST_LOGIT)
        teacher_logits = similarity(teacher_queries, candidates, temperature)
        teacher_logits = teacher_logits.masked_fill(is_absent, LOWEST_LOGIT)
        teacher_targets = teacher_logits.detach().softmax(dim=-1)
        targets = teacher_weight * teacher_targets + (1.0 - teacher_weight) * targets
    return nn.functional.cross_entropy(logits, targets.to(logits.dtype))


class TeacherOutput(NamedTuple):
    """
    Output of a momentum teacher for a batch (ALBEF, https://arxiv.org/abs/2107.07651, section 3). Fields that no
    objective needs are `None`.

    Args:
        image_embeds (`torch.Tensor` of shape `(num_images, projection_dim)`), text_embeds (`torch.Tensor` of shape
            `(num_texts, projection_dim)`): normalized.
        mlm_logits (`torch.Tensor` of shape `(num_texts, text_length, vocab_size)`): scores of the masked texts.
        images, texts (`tuple[torch.Tensor, torch.LongTensor]`): features and image ids of the candidates: first the
            batch of all processes, then past batches. The id -1 marks an empty entry.
        num_images, num_texts (`int`): number of candidates that belong to the batch.
    """

    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    mlm_logits: torch.Tensor | None = None
    images: tuple[torch.Tensor, torch.LongTensor] | None = None
    texts: tuple[torch.Tensor, torch.LongTensor] | None = None
    num_images: int = 0
    num_texts: int = 0


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    temperature: float | torch.Tensor,
    image_ids: torch.LongTensor,
    text_image_ids: torch.LongTensor,
    teacher: TeacherOutput | None = None,
    teacher_weight: float = 0.0,
) -> torch.Tensor:
    """
    Return the image-text contrastive loss (ITC): the mean of the cross-entropies of image-to-text and text-to-image
    retrieval.

    The candidates come from all processes. The loss of a process is the sum over its rows, divided by the mean number
    of rows per process, for the reason that `mean_count` gives.

    Args:
        image_embeds (`torch.Tensor` of shape `(num_images, dim)`), text_embeds (`torch.Tensor` of shape `(num_texts,
            dim)`): Normalized features.
        image_ids, text_image_ids (`torch.LongTensor`): The id of each image, and of each text's image.
        teacher ([`TeacherOutput`], *optional*), teacher_weight (`float`, *optional*, defaults to 0.0): The candidates
            are then the teacher's features, see `retrieval_loss`.
    """
    if teacher is None:
        image_counts, text_counts = row_counts(image_ids, text_image_ids)
        all_image_embeds = gather_with_gradient(image_embeds, image_counts)
        all_image_ids = gather_with_gradient(image_ids, image_counts)
        all_text_embeds = gather_with_gradient(text_embeds, text_counts)
        all_text_image_ids = gather_with_gradient(text_image_ids, text_counts)
        teacher = TeacherOutput(
            images=(all_image_embeds, all_image_ids),
            texts=(all_text_embeds, all_text_image_ids),
            num_images=sum(image_counts),
            num_texts=sum(text_counts),
        )
    candidate_texts, candidate_text_ids = teacher.texts
    loss_per_image = retrieval_loss(
        queries=image_embeds,
        query_ids=image_ids,
        candidates=candidate_texts,
        candidate_ids=candidate_text_ids,
        temperature=temperature,
        teacher_queries=teacher.image_embeds,
        teacher_weight=teacher_weight,
    )
    candidate_images, candidate_image_ids = teacher.images
    loss_per_text = retrieval_loss(
        queries=text_embeds,
        query_ids=text_image_ids,
        candidates=candidate_images,
        candidate_ids=candidate_image_ids,
        temperature=temperature,
        teacher_queries=teacher.text_embeds,
        teacher_weight=teacher_weight,
    )
    image_share = len(image_ids) / teacher.num_images
    text_share = len(text_image_ids) / teacher.num_texts
    return num_processes() * (image_share * loss_per_image + text_share * loss_per_text) / 2


def hard_negative_indices(
    logits: torch.Tensor, same_image: torch.BoolTensor
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """
    Draw one negative for each query from the softmax of its logits over the candidates of other images.

    The maximum of logits plus Gumbel noise has that distribution. Unlike `torch.multinomial`, it works with tiny
    probabilities and does not sync with the device.

    Args:
        logits (`torch.Tensor` of shape `(num_queries, num_candidates)`)
        same_image (`torch.BoolTensor` of shape `(num_queries, num_candidates)`): Candidates that are never drawn.

    Returns:
        The drawn candidates, `(num_queries,)`, and a mask of the same shape. It is False if all candidates are of the
        query's image. The drawn candidate is then no negative; mask that row's loss.
    """
    noise = -torch.empty_like(logits).exponential_().log()
    noisy_logits = (logits.detach() + noise).masked_fill(same_image, float("-inf"))
    return noisy_logits.argmax(dim=-1), ~same_image.all(dim=-1)


def matching_pairs(logits: torch.Tensor, image_ids: torch.LongTensor) -> MatchingPairs:
    """
    Return the pairs of image-text matching (ITM), with hard negatives.

    Args:
        logits (`torch.Tensor` of shape `(T, T)`): entry (i, j) is the similarity of text i and the image of pair j. An
            image in several pairs can be drawn from each of them.
        image_ids (`torch.LongTensor` of shape `(T,)`): Image id of each pair.
    """
    same_image = image_ids[:, None] == image_ids
    negative_images, found = hard_negative_indices(logits, same_image)
    negative_texts, _ = hard_negative_indices(logits.T, same_image)  # found for the same rows
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
    Return the image-text matching loss (ITM), `()`, float32 or wider: the weighted mean of the cross-entropies of the
    pairs of all processes. `logits` are of shape `(num_pairs, 2)`; see [`MatchingPairs`] for the others.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return mean_over_pairs(losses, weights)


def mean_over_pairs(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean of the losses of the pairs of all processes. Both are of shape `(num_pairs,)`."""
    return (losses * weights).sum() / mean_count(weights.sum())


def row_counts(*tensors: torch.Tensor) -> list[list[int]]:
    """Return the number of rows of each tensor in each process, by rank. This syncs with the host."""
    counts = [len(tensor) for tensor in tensors]
    if num_processes() == 1:
        return [[count] for count in counts]
    return torch.stack(_gather(torch.tensor(counts, device=tensors[0].device)), dim=1).tolist()


def gather_with_gradient(tensor: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """
    Return the rows of all processes, by rank; `counts` are those of `row_counts`. The gradient of a process's rows
    sums over the losses of all processes.
    """
    return _GatherWithGradient.apply(tensor, counts) if num_processes() > 1 else tensor


class _GatherWithGradient(torch.autograd.Function):
    """Gather with gradient. The one in `torch.distributed.nn` is deprecated, and its successor is private."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.counts = counts
        padding = tensor.new_empty(max(counts) - len(tensor), *tensor.shape[1:])
        gathered = _gather(torch.cat((tensor, padding)))
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # all_reduce works in place
        distributed.all_reduce(gradient)
        return gradient.split(ctx.counts)[distributed.get_rank()], None


def _gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors of all processes. They must have the same shape."""
    gathered = [torch.empty_like(tensor) for _ in range(num_processes())]
    distributed.all_gather(gathered, tensor)
    return gathered


def check_captions(
    text_states: torch.Tensor,
    num_images: int,
    image_index: torch.LongTensor | None,
    image_ids: torch.LongTensor | None,
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Check `image_index` and `image_ids` and fill in their defaults."""
    num_texts = len(text_states)
    device = text_states.device
    check_counts(num_texts, num_images, image_index)
    check_shape("image_ids", image_ids, num_images)
    if image_index is None:
        image_index = torch.arange(num_texts, device=device)
    if image_ids is None:
        rank = distributed.get_rank() if num_processes() > 1 else 0
        image_ids = torch.arange(num_images, device=device) * num_processes() + rank  # distinct in all processes
    return image_index.to(device), image_ids.to(device)


def masked_language_loss(
    logits: torch.Tensor,
    labels: torch.LongTensor,
    teacher_logits: torch.Tensor | None = None,
    teacher_weight: float = 0.0,
) -> torch.Tensor:
    """
    Return the mean cross-entropy of the masked tokens of all processes. With a momentum teacher (ALBEF, equation 7),
    its distribution has the share `teacher_weight` in the targets.

    Args:
        logits, teacher_logits (`torch.Tensor` of shape `(num_texts, text_length, vocab_size)`)
        labels (`torch.LongTensor` of shape `(num_texts, text_length)`): -100 for tokens that are not masked. If there
            is no other, the loss is 0.
    """
    log_probabilities = logits.float().log_softmax(dim=-1)  # (num_texts, text_length, vocab_size)
    is_masked = labels != -100
    losses = nn.functional.nll_loss(log_probabilities.transpose(1, 2), labels, reduction="none")
    if teacher_logits is not None:
        teacher_targets = teacher_logits.detach().float().softmax(dim=-1)
        teacher_losses = -(teacher_targets * log_probabilities).sum(dim=-1)
        teacher_losses = teacher_losses * is_masked
        losses = teacher_weight * teacher_losses + (1.0 - teacher_weight) * losses
    return losses.sum() / mean_count(is_masked.sum())


# Retrieval


# ALBEF's temperature: initial value and bounds.
INITIAL_TEMPERATURE = 0.07
MIN_TEMPERATURE = 0.001
MAX_TEMPERATURE = 0.5


@auto_docstring(custom_intro="Output of [`TripsForRetrieval`].")
@dataclass
class TripsRetrievalOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, *optional*):
        The weighted sum of `itc_loss`, `itm_loss` and `selection_loss`.
    itc_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Image-text contrastive loss, over the batch of all processes.
    itm_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Image-text matching loss.
    selection_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Selection supervision of the texts in their own images, the mean over the texts. Returned in training, if
        regions are given and there is a matching loss.
    relevance_values (`tuple(torch.FloatTensor)`, *optional*):
        As in [`TripsModelOutput`], of the pairs of the matching loss, which carries its gradient.
    logits_per_image (`torch.FloatTensor` of shape `(num_images, num_texts)`, *optional*):
        Similarity of each image to each text of this process, divided by the temperature.
    logits_per_text (`torch.FloatTensor` of shape `(num_texts, num_images)`, *optional*):
        Its transpose.
    itm_logits (`torch.FloatTensor` of shape `(3 * num_texts, 2)`, *optional*):
        Scores of the pairs of the matching loss: each text with its image, then with a negative image, then each image
        with a negative text. Column 1 is the score of a match.
    image_embeds (`torch.FloatTensor` of shape `(num_images, projection_dim)`, *optional*):
        Normalized features of the images.
    text_embeds (`torch.FloatTensor` of shape `(num_texts, projection_dim)`, *optional*):
        Normalized features of the texts.
    selection (`tuple(TripsSelection)`, *optional*):
        Kept patches of each selection layer: scored by each text in its image if there is a matching loss, else scored
        by each image.
    text_model_output (`BaseModelOutputWithPooling`, *optional*):
        Output of the text encoder.
    vision_model_output (`TripsVisionModelOutput`, *optional*):
        Output of the vision tower without a text.
    """

    loss: torch.FloatTensor | None = None
    itc_loss: torch.FloatTensor | None = None
    itm_loss: torch.FloatTensor | None = None
    selection_loss: torch.FloatTensor | None = None
    relevance_values: tuple[torch.FloatTensor, ...] | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    itm_logits: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    selection: tuple[TripsSelection, ...] | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: TripsVisionModelOutput | None = None


@auto_docstring(custom_intro="Output of [`TripsForRetrieval.match`].")
@dataclass
class TripsMatchingOutput(TripsModelOutput):
    r"""
    itm_logits (`torch.FloatTensor` of shape `(num_pairs, 2)`):
        Scores of the pairs. `itm_logits.softmax(-1)[:, 1]` is the probability of a match. The other fields are those
        of [`TripsModelOutput`], one row per pair.
    """

    itm_logits: torch.FloatTensor | None = None


MATCHING_ARGS = r"""
image_index (`torch.LongTensor` of shape `(num_pairs,)`, *optional*):
    Pair p has image `image_index[p]`. By default image p.
text_states (`torch.FloatTensor` of shape `(num_texts, text_length, hidden_size)`, *optional*):
    The `last_hidden_state` of `get_text_features`, in place of `input_ids`.
text_index (`torch.LongTensor` of shape `(num_pairs,)`, *optional*):
    Pair p has text `text_index[p]`. By default text p.
"""

RETRIEVAL_ARGS = r"""
image_ids (`torch.LongTensor` of shape `(num_images,)`, *optional*):
    Images with equal ids, in any process, are the same image and share their texts. By default all are distinct.
return_loss (`bool`, *optional*):
    Whether to compute the losses. By default, if `image_ids` are given.
"""


class TripsTemperature(nn.Module):
    """
    Learned temperature of the similarities, clamped to its bounds.

    It is a module because device maps and int8 checkpoints handle only parameters of modules, and it has one dimension
    because FSDP shards along a dimension.
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))

    def forward(self) -> torch.Tensor:
        return self.weight.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)


@auto_docstring(
    custom_intro="Base of retrieval and pre-training: features that compare images with texts, and matching."
)
class TripsContrastiveModel(TripsPreTrainedModel):  # trf-ignore: TRF013 (the heads call `post_init`, when complete)
    accepts_loss_kwargs = False  # each loss is a mean over its own items: `Trainer` averages accumulated batches

    def __init__(self, config: TripsConfig):
        super().__init__(config)
        if config.fusion_encoder_config.fusion_type == "single_stream":
            raise ValueError(
                f"{type(self).__name__} compares features of images with those of texts, but in a single stream no "
                "layer sees one of them alone: choose `fusion_type='cross_attention'` or `'skip_connected'`."
            )
        self.model = TripsModel(config)
        self.vision_proj = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        self.text_proj = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        self.itm_head = nn.Linear(config.fusion_encoder_config.hidden_size, 2)
        self.temp = TripsTemperature()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, TripsTemperature):
            init.constant_(module.weight, INITIAL_TEMPERATURE)

    @can_return_tuple
    @auto_docstring
    def get_text_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Returns:
            The output of the text encoder. Its `pooler_output`, of shape `(num_texts, projection_dim)` and float32 or
            wider, holds the normalized features. Its `last_hidden_state` can be passed to `match` as `text_states`.
        """
        text_outputs = self.model.text_model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, **kwargs
        )
        text_outputs.pooler_output = _normalized(self.text_proj(text_outputs.pooler_output))
        return text_outputs

    @can_return_tuple
    @auto_docstring(custom_args=SHARED_ARGS)
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor | None = None,
        image_cache: TripsImageCache | None = None,
        schedule: SelectionSchedule | str | None = None,
        keep_rate: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TripsVisionModelOutput:
        r"""
        Returns:
            The output of the vision tower without a text. Its `pooler_output`, of shape `(num_images, projection_dim)`
            and float32 or wider, holds the normalized features.
        """
        vision_outputs = self.model.vision_model(
            pixel_values=pixel_values,
            image_cache=image_cache,
            schedule=schedule,
            keep_rate=keep_rate,
            **kwargs,
        )
        vision_outputs.pooler_output = _normalized(self.vision_proj(vision_outputs.pooler_output))
        return vision_outputs

    @can_return_tuple
    @auto_docstring(
        custom_intro="""
        Score pairs of image and text, for reranking. A text or image in several pairs is encoded once.
        """,
        custom_args=SHARED_ARGS + MATCHING_ARGS,
    )
    def match(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_cache: TripsImageCache | None = None,
        text_states: torch.FloatTensor | None = None,
        text_index: torch.LongTensor | None = None,
        schedule: SelectionSchedule | str | None = None,
        keep_rate: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TripsMatchingOutput:
        if (input_ids is None) == (text_states is None):
            raise ValueError("Specify exactly one of `input_ids` and `text_states`.")
        if text_states is None:
            text_outputs = self.model.text_model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, **kwargs
            )
            text_states = text_outputs.last_hidden_state
        text_states = select_rows(text_states, text_index)  # (num_pairs, text_length, hidden_size)
        attention_mask = select_rows(attention_mask, text_index)
        fused = self.model.fuse(
            text_states=text_states,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_index=image_index,
            image_cache=image_cache,
            schedule=schedule,
            keep_rate=keep_rate,
            **kwargs,
        )
        class_state = class_states(fused.last_hidden_state, attention_mask)  # (num_pairs, hidden_size)
        return TripsMatchingOutput(**fused, itm_logits=self.itm_head(class_state))

    def compare(self, text_outputs, image_outputs) -> TripsRetrievalOutput:
        """Return the similarities of all images and texts."""
        text_embeds = text_outputs.pooler_output
        image_embeds = image_outputs.pooler_output.to(text_embeds.device)  # the parts may lie on several devices
        logits_per_text = similarity(text_embeds, image_embeds, self.temp())
        return TripsRetrievalOutput(
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            selection=image_outputs.selection,
            text_model_output=text_outputs,
            vision_model_output=image_outputs,
        )

    def pair_losses(
        self,
        text_outputs: BaseModelOutputWithPooling,
        image_cache: TripsImageCache,
        attention_mask: torch.Tensor | None,
        image_index: torch.LongTensor | None,
        image_ids: torch.LongTensor | None,
        teacher: TeacherOutput | None = None,
        teacher_weight: float = 0.0,
        regions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsRetrievalOutput:
        """
        Return the output of `forward` with the losses of contrast, matching and supervision, and their sum. `kwargs`
        have the schedule and the keep rate.
        """
        config = self.config
        text_states = text_outputs.last_hidden_state
        num_texts = len(text_states)
        num_images = len(image_cache.hidden_states)
        image_index, image_ids = check_captions(text_states, num_images, image_index, image_ids)
        pair_ids = image_ids[image_index]  # (num_texts,)
        outputs = TripsRetrievalOutput(text_embeds=text_outputs.pooler_output, text_model_output=text_outputs)
        # CODEPATH: a weight of 0 leaves out contrast and its compute.
        if config.itc_weight > 0:
            image_outputs = self.get_image_features(image_cache=image_cache, **kwargs)
            outputs = self.compare(text_outputs, image_outputs)
            outputs.itc_loss = contrastive_loss(
                image_embeds=outputs.image_embeds,
                text_embeds=outputs.text_embeds,
                temperature=self.temp(),
                image_ids=image_ids,
                text_image_ids=pair_ids,
                teacher=teacher,
                teacher_weight=teacher_weight,
            )
        # CODEPATH: a weight of 0 leaves out matching, the supervision of its pairs, and their compute.
        if config.itm_weight > 0:
            pair_logits = torch.zeros(num_texts, num_texts, device=pair_ids.device)
            if outputs.logits_per_text is not None:
                pair_logits = outputs.logits_per_text[:, image_index]
            pairs = matching_pairs(pair_logits, pair_ids)
            if regions is not None:
                # The negative pairs, which come last, have no supervision: their regions have no area.
                num_negatives = len(pairs.labels) - len(regions)
                regions = nn.functional.pad(regions, (0, 0, 0, num_negatives))  # (num_pairs, 4)
            matched = self.match(
                attention_mask=attention_mask,
                image_index=image_index[pairs.image_index],
                image_cache=image_cache,
                text_states=text_states,
                text_index=pairs.text_index,
                regions=regions,
                **kwargs,
            )
            outputs.itm_logits = matched.itm_logits
            outputs.itm_loss = matching_loss(matched.itm_logits, pairs.labels, pairs.weights)
            if matched.relevance_losses is not None:  # 0, but for their gradient
                outputs.itm_loss = outputs.itm_loss + mean_over_pairs(matched.relevance_losses, pairs.weights)
            if matched.selection_losses is not None:
                outputs.selection_loss = matched.selection_losses.sum() / mean_count(pairs.labels.sum())
            true_pairs = torch.arange(num_texts, device=pair_ids.device)
            outputs.selection = tuple(layer.rows(true_pairs) for layer in matched.selection)
            outputs.relevance_values = matched.relevance_values
        loss = weighted_sum(
            [
                (config.itc_weight, outputs.itc_loss),
                (config.itm_weight, outputs.itm_loss),
                (config.selection_loss_weight, outputs.selection_loss),
            ]
        )
        return replace(outputs, loss=loss)


@auto_docstring(
    custom_intro="""
    TRIPS for image-text retrieval, in ALBEF's two stages. The features of images and texts are independent, so both
    can be indexed. Their patches are scored by the image's [CLS]. `match` then reranks the best candidates with
    patches that are scored by the text.
    """
)
class TripsForRetrieval(TripsContrastiveModel):
    auto_classes = ("AutoModelForZeroShotImageClassification", "AutoModel")
    pipeline_class = TripsZeroShotImageClassificationPipeline

    def __init__(self, config: TripsConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    @auto_docstring(custom_args=SHARED_ARGS + RETRIEVAL_ARGS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        regions: torch.FloatTensor | None = None,
        schedule: SelectionSchedule | str | None = None,
        keep_rate: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TripsRetrievalOutput:
        r"""
        Example:

        ```python
        >>> import torch
        >>> from modeling_trips import TripsConfig, TripsForRetrieval

        >>> model = TripsForRetrieval(TripsConfig.from_preset("tiny")).eval()
        >>> texts, images = torch.tensor([[2, 5, 3], [2, 6, 3]]), torch.randn(2, 3, 64, 64)
        >>> tuple(model(texts, images).logits_per_image.shape)
        (2, 2)
        >>> tuple(model.match(texts, images).itm_logits.shape)
        (2, 2)
        ```
        """
        if return_loss is None:
            return_loss = image_ids is not None
        text_outputs = self.get_text_features(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, **kwargs
        )
        if not return_loss:
            image_outputs = self.get_image_features(
                pixel_values=pixel_values, schedule=schedule, keep_rate=keep_rate, **kwargs
            )
            return self.compare(text_outputs, image_outputs)
        image_cache = self.model.encode_images(pixel_values, schedule=schedule, keep_rate=keep_rate, **kwargs)
        outputs = self.pair_losses(
            text_outputs,
            image_cache,
            attention_mask=attention_mask,
            image_index=image_index,
            image_ids=image_ids,
            regions=regions,
            schedule=schedule,
            keep_rate=keep_rate,
            **kwargs,
        )
        if outputs.loss is None:
            raise ValueError("`itc_weight` and `itm_weight` are both 0. Set one of them to get a loss.")
        return outputs


def _normalized(embeds: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(embeds.to(torch.promote_types(embeds.dtype, torch.float32)), dim=-1)


TripsForRetrieval.register_for_auto_class("AutoModelForZeroShotImageClassification")


# Pre-training


PRETRAINING_ARGS = r"""
mlm_input_ids (`torch.LongTensor` of shape `(num_texts, text_length)`, *optional*):
    The texts with masked tokens, as [`~transformers.DataCollatorForLanguageModeling`] makes them.
mlm_labels (`torch.LongTensor` of shape `(num_texts, text_length)`, *optional*):
    The masked tokens; -100 elsewhere.
prompt_input_ids (`torch.LongTensor` of shape `(num_texts, prompt_length)`, *optional*):
    The beginnings of the texts.
prompt_attention_mask (`torch.Tensor` of shape `(num_texts, prompt_length)`, *optional*):
    0 marks padding in `prompt_input_ids`.
labels (`torch.LongTensor` of shape `(num_texts, label_length)`, *optional*):
    The continuations of the texts, with the end token; -100 is ignored.
teacher ([`TeacherOutput`], *optional*):
    Output of a momentum teacher. It softens the targets of the contrastive loss and of masked language
    modeling, and adds candidates to the contrastive loss.
teacher_weight (`float`, *optional*, defaults to 0.0):
    Share of the teacher in the targets (ALBEF's alpha).
"""


@auto_docstring(custom_intro="Output of [`TripsForPreTraining`].")
@dataclass
class TripsForPreTrainingOutput(TripsRetrievalOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, *optional*):
        The weighted sum of the losses below.
    mlm_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Masked language modeling: masked words are predicted from the rest of the text and the image.
    prefix_lm_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Prefix language modeling: the decoder continues a caption from its beginning and the image.
    mlm_logits (`torch.FloatTensor` of shape `(num_texts, text_length, vocab_size)`, *optional*):
        Scores of the masked text's tokens.
    """

    mlm_loss: torch.FloatTensor | None = None
    prefix_lm_loss: torch.FloatTensor | None = None
    mlm_logits: torch.FloatTensor | None = None


@auto_docstring(
    custom_intro="""
    TRIPS for pre-training with ALBEF's objectives and mPLUG's prefix language modeling. The objectives share the
    cached image states. Above them, each text selects its own patches: a caption, its masked form, its beginning, and
    the caption of a negative pair.
    """
)
class TripsForPreTraining(TripsContrastiveModel, TripsWritingModel):
    auto_classes = ("AutoModelForPreTraining",)
    _tied_weights_keys = {
        "mlm_score.decoder.weight": "model.text_model.embeddings.word_embeddings.weight",
        "lm_head.decoder.weight": "decoder.embeddings.word_embeddings.weight",
    }

    def __init__(self, config: TripsConfig):
        super().__init__(config)
        # CODEPATH: only prefix language modeling generates text.
        if config.prefix_lm_weight > 0:
            config.check_start_token()
        self.mlm_score = TripsLMHead(config.text_config)
        self.add_decoder()
        self.post_init()

    def get_output_embeddings(self):
        return self.mlm_score.decoder

    def set_output_embeddings(self, new_embeddings):
        self.mlm_score.decoder = new_embeddings

    @can_return_tuple
    @auto_docstring(custom_args=SHARED_ARGS + RETRIEVAL_ARGS + PRETRAINING_ARGS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_ids: torch.LongTensor | None = None,
        mlm_input_ids: torch.LongTensor | None = None,
        mlm_labels: torch.LongTensor | None = None,
        prompt_input_ids: torch.LongTensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        teacher: TeacherOutput | None = None,
        teacher_weight: float = 0.0,
        regions: torch.FloatTensor | None = None,
        schedule: SelectionSchedule | str | None = None,
        keep_rate: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TripsForPreTrainingOutput:
        r"""
        Example:

        ```python
        >>> import torch
        >>> from modeling_trips import TripsConfig, TripsForPreTraining

        >>> model = TripsForPreTraining(TripsConfig.from_preset("tiny"))
        >>> texts, images = torch.tensor([[2, 5, 3], [2, 6, 3]]), torch.randn(2, 3, 64, 64)
        >>> outputs = model(texts, images)
        >>> [name for name, value in outputs.items() if name.endswith("_loss")]
        ['itc_loss', 'itm_loss']
        ```
        """
        config = self.config
        image_cache = self.model.encode_images(pixel_values, schedule=schedule, keep_rate=keep_rate, **kwargs)
        text_outputs = self.get_text_features(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, **kwargs
        )
        outputs = self.pair_losses(
            text_outputs,
            image_cache,
            attention_mask=attention_mask,
            image_index=image_index,
            image_ids=image_ids,
            teacher=teacher,
            teacher_weight=teacher_weight,
            regions=regions,
            schedule=schedule,
            keep_rate=keep_rate,
            **kwargs,
        )
        mlm_loss = None
        mlm_logits = None
        prefix_lm_loss = None
        # CODEPATH: a weight of 0 leaves out masked language modeling and its compute.
        if config.mlm_weight > 0 and mlm_labels is not None:
            mlm_logits = self.masked_token_logits(
                mlm_input_ids=mlm_input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                image_index=image_index,
                image_cache=image_cache,
                schedule=schedule,
                keep_rate=keep_rate,
                **kwargs,
            )
            teacher_logits = None if teacher is None else teacher.mlm_logits
            mlm_loss = masked_language_loss(mlm_logits, mlm_labels, teacher_logits, teacher_weight)
        # CODEPATH: a weight of 0 leaves out prefix language modeling and its compute.
        if config.prefix_lm_weight > 0 and labels is not None:
            fused = self.model(
                input_ids=prompt_input_ids,
                attention_mask=prompt_attention_mask,
                image_index=image_index,
                image_cache=image_cache,
                schedule=schedule,
                keep_rate=keep_rate,
                **kwargs,
            )
            decoded = self.decoder(
                self.prepare_decoder_input_ids_from_labels(labels),
                encoder_hidden_states=fused.last_hidden_state,
                encoder_attention_mask=prompt_attention_mask,
                use_cache=False,
                **kwargs,
            )
            logits = self.lm_head(decoded.last_hidden_state)  # (num_texts, label_length, vocab_size)
            num_tokens = mean_count((labels != -100).sum())  # 0 if all texts are too short to be cut
            prefix_lm_loss = label_loss(logits, labels, num_tokens)
        loss = weighted_sum(
            [(1.0, outputs.loss), (config.mlm_weight, mlm_loss), (config.prefix_lm_weight, prefix_lm_loss)]
        )
        return TripsForPreTrainingOutput(
            **replace(outputs, loss=loss), mlm_loss=mlm_loss, prefix_lm_loss=prefix_lm_loss, mlm_logits=mlm_logits
        )

    def masked_token_logits(self, mlm_input_ids: torch.LongTensor, **kwargs) -> torch.Tensor:
        """
        Return the scores of the masked texts' tokens, `(num_texts, text_length, vocab_size)`. The other arguments are
        those of [`TripsModel`].
        """
        fused = self.model(input_ids=mlm_input_ids, **kwargs)
        return self.mlm_score(fused.last_hidden_state)


TripsForPreTraining.register_for_auto_class("AutoModelForPreTraining")

__all__ = [
    "TeacherOutput",
    "TripsContrastiveModel",
    "TripsForPreTraining",
    "TripsForPreTrainingOutput",
    "TripsForRetrieval",
    "TripsMatchingOutput",
    "TripsRetrievalOutput",
]
