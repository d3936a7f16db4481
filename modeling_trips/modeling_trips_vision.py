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
The base class of all models, and the vision towers of TRIPS: a Vision Transformer with selection layers, and the same
in a single stream with the text (ViLT's form).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPMLP, eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_trips import LayerSelection, SelectionSchedule, TripsConfig, TripsVisionConfig
from .patch_selection import (
    FUSED_TOKEN,
    choose_tokens,
    gather_tokens,
    keep_topk,
    random_scores,
    score_tokens,
    select_rows,
    shorten_tokens,
)


logger = logging.get_logger(__name__)

# Arguments of the models' `forward`, for those that have them
SHARED_ARGS = r"""
image_index (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
    Text i looks at image `image_index[i]`. By default text i looks at image i.
image_cache (`TripsImageCache`, *optional*):
    Result of `encode_images` of the bare model, in place of `pixel_values`.
regions (`torch.FloatTensor` of shape `(num_texts, 4)`, *optional*):
    The target region of each text: boxes (center_x, center_y, width, height) in [0, 1] of the image in `pixel_values`,
    as [`TripsProcessor.encode_boxes`] returns them; a box without area if it is not known. In training they supervise
    the selection, see `selection_loss_weight`.
schedule (`SelectionSchedule` or `str`, *optional*):
    How the vision layers select in this pass, in place of the configuration's. In training with one whose layers only
    score, their scores learn which patches the loss needs, see [`RelevanceGradient`].
keep_rate (`float`, *optional*):
    Share of the patches to keep in this pass, in (0, 1], in place of that of the schedule, which must have one layer.
    1.0 keeps all. A rate outside of those that the model was trained with (`trained_keep_rates`) is a warning, once.
text_embeds (`torch.FloatTensor` of shape `(num_texts, guidance_hidden_size)`, *optional*):
    The text guidance t: the [CLS] output of the text encoder. Without it the image guides itself.
text_states (`torch.FloatTensor` of shape `(num_texts, text_length, hidden_size)`):
    Embeddings of the texts. The first token that is not padding, [CLS], guides.
"""


# The base class, and attention that the towers share


@auto_docstring
class TripsPreTrainedModel(PreTrainedModel):
    config: TripsConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "TripsVisionEmbeddings",
        "TripsTextEmbeddings",
        "TripsVisionLayer",
        "TripsTextLayer",
        "TripsCrossLayer",
        "TripsConnectedLayer",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # The Auto classes that load this class from its checkpoint.
    auto_classes: ClassVar[tuple[str, ...]] = ()
    # The pipeline that runs it.
    pipeline_class: ClassVar[type | None] = None

    # Internals of Transformers that this and derived classes override, to check with each new release of it:
    # `_can_set_attn_implementation`, `_set_gradient_checkpointing`, `_init_weights`, `_input_embed_layer`,
    # `_can_record_outputs`, `_expand_inputs_for_generation`, `adjust_generation_fn`, `get_output_embeddings`,
    # `resize_token_embeddings`, `save_pretrained`.

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # by `TripsAttention`; the library searches only the module of a class

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        """
        As in Transformers.

        Raises:
            ValueError: Layers would be recomputed without the values that they take by keyword, or with other draws.
        """
        options = getattr(gradient_checkpointing_func, "keywords", {})
        for name, needed in (("use_reentrant", False), ("preserve_rng_state", True)):
            if enable and options.get(name, needed) is not needed:
                raise ValueError(f"Activation checkpointing needs `{name}={needed}`, got {options[name]}.")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """As in Transformers. The configuration names this class, and for `AutoModel` the bare model, but no other."""
        # FSDP2 makes a class of its own for a sharded model, whose code no checkpoint has.
        model_class: Any = next(base for base in type(self).__mro__ if not base.__module__.startswith("torch."))
        model = object.__new__(model_class)
        model.__dict__ = self.__dict__

        auto_map = {}
        if model_class.config_class is TripsConfig:
            auto_map["AutoModel"] = "modeling_trips.TripsModel"
        for auto_class in model_class.auto_classes:
            auto_map[auto_class] = name_in_checkpoint(model_class)
        self.config.auto_map = auto_map

        self.config.__dict__.pop("custom_pipelines", None)
        pipeline_class = model_class.pipeline_class
        if pipeline_class is not None:
            pipeline_info = {
                "impl": name_in_checkpoint(pipeline_class),
                "pt": [model_class.auto_classes[0]],
                "type": "multimodal",
            }
            self.config.custom_pipelines = {pipeline_class.default_task: pipeline_info}

        kwargs.setdefault("save_original_format", False)  # a part of a whole model is saved under its own names
        super(TripsPreTrainedModel, model).save_pretrained(save_directory, **kwargs)


def name_in_checkpoint(cls: type) -> str:
    """Return the name of a class in the code of a checkpoint: `"modeling_trips.TripsModel"`."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


class TripsAttention(nn.Module):
    """Multi-head attention by the configured implementation: what attention has in common for images and texts."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`(batch_size, seq_length, hidden_size)` -> `(batch_size, num_heads, seq_length, head_dim)`."""
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        implementation: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Return the output, `(batch_size, query_length, hidden_size)`, and the weights, if the implementation has them.
        The implementation is by default the configured one, which needs masks in a form of its own.
        """
        implementation = implementation or self.config._attn_implementation
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attn_output, attn_weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return attn_output.flatten(2).contiguous(), attn_weights


def bidirectional_mask(config: PreTrainedConfig, attention_mask: torch.Tensor | None, **kwargs):
    """
    Return Transformers' `create_bidirectional_mask`. A given padding mask is always used, since a look at its values
    would sync with the host.
    """
    return create_bidirectional_mask(
        config=config, attention_mask=attention_mask, allow_is_bidirectional_skip=attention_mask is None, **kwargs
    )


def joint_padding_mask(attention_mask: torch.Tensor | None, num_image_tokens: int) -> torch.Tensor | None:
    """Return the padding mask of texts joined with image tokens, which have no padding; `None` stays `None`."""
    if attention_mask is None:
        return None
    return nn.functional.pad(attention_mask, (0, num_image_tokens), value=1)


def first_positions(attention_mask: torch.Tensor) -> torch.LongTensor:
    """Return the position of each text's first token, [CLS], `(num_texts,)`: 0 unless texts are padded on the left."""
    return attention_mask.long().argmax(dim=-1)


def class_states(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return the state of each text's [CLS]: `(num_texts, text_length, hidden_size)` -> `(num_texts, hidden_size)`."""
    if attention_mask is None:
        return hidden_states[:, 0]
    positions = first_positions(attention_mask).to(hidden_states.device)
    return gather_tokens(hidden_states, positions[:, None])[:, 0]


# Checks of inputs


def check_counts(num_texts: int, num_images: int, image_index: torch.LongTensor | None):
    if image_index is None and num_texts != num_images:
        raise ValueError(
            f"Got {num_texts} texts for {num_images} images. Pass one image per text, or `image_index`, the image of "
            "each text."
        )
    check_shape("image_index", image_index, num_texts)


def check_shape(name: str, tensor: torch.Tensor | None, *shape: int):
    """Raise a `ValueError` if there is a tensor and it has another shape."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}.")


def check_image_source(pixel_values: torch.Tensor | None, image_cache: object | None):
    if (pixel_values is None) == (image_cache is None):
        raise ValueError("Specify exactly one of `pixel_values` and `image_cache`.")


def resolve_schedule(
    config: TripsVisionConfig, schedule: SelectionSchedule | str | None, keep_rate: float | None = None
) -> SelectionSchedule:
    """
    Return the schedule of a pass, by default the configuration's, at another keep rate if that is given.

    Raises:
        ValueError: A layer does not exist, or `keep_rate` is out of its range or for another number of layers than 1.
    """
    schedule = SelectionSchedule.parse(config.schedule if schedule is None else schedule)
    schedule.check_fits(config.num_hidden_layers)
    if keep_rate is None:
        return schedule
    schedule = schedule.with_keep_rate(keep_rate)
    trained = config.trained_keep_rates
    if trained and not min(trained) <= keep_rate <= max(trained):
        logger.warning_once(
            f"`keep_rate` {keep_rate:g} is outside of what this model was trained with, {min(trained):g} to "
            f"{max(trained):g}. Its accuracy there is not known."
        )
    return schedule


# Layers


class TripsBatchNorm(nn.BatchNorm2d):
    """Batch norm that keeps its statistics while it is frozen, as adapters do not save them."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.weight.requires_grad or not self.training:
            return super().forward(hidden_states)
        return nn.functional.batch_norm(
            hidden_states,
            running_mean=self.running_mean,
            running_var=self.running_var,
            weight=self.weight,
            bias=self.bias,
            eps=self.eps,
        )


class TripsConvolutionalStem(nn.Module):
    """
    Batch-normalised 3x3 convolutions of stride 2 with doubling channels, from an image to its patch grid
    (https://arxiv.org/abs/2106.14881).
    """

    def __init__(self, config: TripsVisionConfig):
        super().__init__()
        num_layers = config.patch_shape[0].bit_length() - 1  # each halves the side of a patch
        self.convolutions = nn.ModuleList()
        self.norms = nn.ModuleList()
        in_width = config.num_channels
        for layer_idx in range(num_layers):
            width = config.hidden_size // 2 ** (num_layers - 1 - layer_idx)
            convolution = nn.Conv2d(in_width, width, kernel_size=3, stride=2, padding=1, bias=False)
            self.convolutions.append(convolution)
            self.norms.append(TripsBatchNorm(width))
            in_width = width

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = pixel_values
        for convolution, norm in zip(self.convolutions, self.norms):
            hidden_states = convolution(hidden_states)
            hidden_states = norm(hidden_states)
            hidden_states = nn.functional.relu(hidden_states)
        return hidden_states


class TripsPatchEmbeddings(nn.Module):
    """Images `(num_images, num_channels, height, width)` -> patches `(num_images, num_patches, hidden_size)`."""

    def __init__(self, config: TripsVisionConfig):
        super().__init__()
        self.stem = None
        num_channels = config.num_channels
        size = config.patch_size
        # CODEPATH: "linear" is the patch embedding of ViT, "convolutional" a stem for training from scratch.
        if config.patch_embedding_type == "convolutional":
            self.stem = TripsConvolutionalStem(config)
            num_channels = config.hidden_size
            size = 1
        self.projection = nn.Conv2d(
            num_channels, config.hidden_size, kernel_size=size, stride=size, bias=config.patch_bias
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.stem is not None:
            pixel_values = self.stem(pixel_values)
        patches = self.projection(pixel_values)  # (num_images, hidden_size, num_rows, num_columns)
        return patches.flatten(2).transpose(1, 2)


class TripsVisionAttention(TripsAttention):
    """Self-attention of the ViT. It also returns the queries and keys, for patch selection."""

    def __init__(self, config: TripsVisionConfig):
        super().__init__(config)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        query = self.split_heads(self.q_proj(hidden_states))
        key = self.split_heads(self.k_proj(hidden_states))
        value = self.split_heads(self.v_proj(hidden_states))
        attn_output, attn_weights = self.attend(query, key, value, attention_mask, **kwargs)
        attn_output = self.o_proj(attn_output)
        return attn_output, attn_weights, query, key


class GuidingTexts(NamedTuple):
    """
    The texts of a pass through a vision tower.

    Args:
        embeds (`torch.Tensor` of shape `(num_texts, hidden_size)`, *optional*): The text guidance.
        image_index (`torch.LongTensor` of shape `(num_texts,)`, *optional*): The row of each text, as long as texts
            share rows. By default text i has row i.
        length (`int`, *optional*, defaults to 0): In a single stream, the number of text tokens before the image's
            [CLS], padding included.
        attention_mask (`torch.Tensor` of shape `(num_texts, length)`, *optional*): 0 marks their padding.
    """

    embeds: torch.Tensor | None = None
    image_index: torch.Tensor | None = None
    length: int = 0
    attention_mask: torch.Tensor | None = None

    @property
    def num_tokens_before(self) -> int:
        """Number of tokens before the candidates: those of the text in a single stream, and the image's [CLS]."""
        return self.length + 1


class ScoredTokens(NamedTuple):
    """
    What a selection layer makes of its candidates.

    Args:
        scores (`torch.Tensor` of shape `(num_texts, num_candidates)`): float32 or wider.
        kept (`torch.LongTensor` of shape `(num_texts, num_kept)`): Positions of those that it keeps, ascending.
        has_own_rows (`bool`): Whether the states have a row per text now. A layer that only scores leaves them shared.
    """

    scores: torch.Tensor
    kept: torch.Tensor
    has_own_rows: bool


class TripsVisionLayer(GradientCheckpointingLayer):
    """
    A pre-norm ViT layer that selects patches between attention and MLP (paper, section 3.2): the MLP already runs on
    the shorter sequence. In a single stream, text tokens come before the image's [CLS] and the candidates.
    """

    def __init__(self, config: TripsVisionConfig):
        super().__init__()
        self.config = config
        self.attention = TripsVisionAttention(config)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        texts: GuidingTexts,
        attention_mask: Any = None,
        selection: LayerSelection | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, ScoredTokens | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(num_rows, texts.length + 1 + num_candidates, hidden_size)`)
            texts ([`GuidingTexts`]): With `image_index`, attention runs once per row, selection and MLP once per text.
            attention_mask (*optional*): Hides padding, in the form of the attention in use.
            selection ([`LayerSelection`], *optional*): What scores the candidates and how many are kept. By default
                the layer does not select, and nothing is scored.
        """
        residual = hidden_states
        hidden_states = self.layernorm_before(hidden_states)
        attn_output, _, query, key = self.attention(hidden_states, attention_mask, **kwargs)
        hidden_states = residual + self.dropout(attn_output)

        scored = None
        if selection is not None:
            key = key[:, :, texts.num_tokens_before :]  # (num_rows, num_heads, num_candidates, head_dim)
            key = select_rows(key, texts.image_index)  # (num_texts, num_heads, num_candidates, head_dim)
            scores = self.score_candidates(query, key, selection, texts)
            kept = choose_tokens(scores, selection.keep_rate)
            scored = ScoredTokens(scores, kept, has_own_rows=not selection.only_scores)
            if scored.has_own_rows:
                hidden_states = select_rows(hidden_states, texts.image_index)
                hidden_states = shorten_tokens(hidden_states, scores, kept, self.config.fuse_inattentive_tokens)

        residual = hidden_states
        hidden_states = self.layernorm_after(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + self.dropout(hidden_states)
        return hidden_states, scored

    def score_candidates(
        self, query: torch.Tensor, key: torch.Tensor, selection: LayerSelection, texts: GuidingTexts
    ) -> torch.Tensor:
        """
        Return the scores of the candidates, `(num_texts, num_candidates)`, float32 or wider. Each row is positive and
        sums to 1. `query` is that of all tokens, `key` that of the candidates.
        """
        if selection.guidance == "random":
            num_texts, _, num_candidates, _ = key.shape
            return random_scores(num_texts, num_candidates, key.device)
        guiding_query = self.guiding_query(query, selection, texts)
        return score_tokens(guiding_query, key, self.attention.scaling)

    def guiding_query(self, query: torch.Tensor, selection: LayerSelection, texts: GuidingTexts) -> torch.Tensor:
        """Return the query of the token that scores the candidates, `(num_texts, num_heads, head_dim)`."""
        if selection.guidance != "text":
            return query[:, :, texts.length]  # the image's [CLS]
        if texts.embeds is not None:
            text_query = self.attention.q_proj(texts.embeds)
        else:
            # The first token is the text's [CLS] in a single stream, or the image's, if no text is given.
            text_query = class_states(query.transpose(1, 2).flatten(2), texts.attention_mask)
        return text_query.unflatten(-1, (-1, self.attention.head_dim))


@auto_docstring(custom_intro="What one selection layer kept.")
@dataclass
class TripsSelection(ModelOutput):
    r"""
    kept_indices (`torch.LongTensor` of shape `(batch_size, num_kept)`):
        The kept candidates, in order: row-major index of each patch in the original grid, -1 for the fused token of an
        earlier selection layer.
    scores (`torch.FloatTensor` of shape `(batch_size, num_candidates)`):
        The scores of all candidates of this layer. Each row sums to 1.
    candidate_indices (`torch.LongTensor` of shape `(batch_size, num_candidates)`):
        The original index of each candidate, -1 for a fused token.
    """

    kept_indices: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    candidate_indices: torch.LongTensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "TripsSelection":
        """Return a selection with the result of `function` in place of each tensor."""
        return TripsSelection(*map(function, self.to_tuple()))

    def rows(self, index: torch.LongTensor | None) -> "TripsSelection":
        """Return [`select_rows`] of each tensor."""
        return self.map(lambda tensor: select_rows(tensor, index))


@dataclass(frozen=True)
class TripsImageCache:
    r"""
    The text-independent part of the vision tower's work, computed once per image. `image_cache[rows]` are the rows of
    some images.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(num_images, 1 + num_candidates, hidden_size)`):
            [CLS] and candidates before the first layer that a text scores; after the last layer if there is none.
        grid_size (`tuple(int, int)`):
            Patches of each image, down and across.
        candidate_indices (`torch.LongTensor` of shape `(num_images, num_candidates)`):
            The original index of each candidate, -1 for a fused token.
        selection (`tuple(TripsSelection)`, *optional*):
            What the layers before `next_layer` kept.
        next_layer (`int`, *optional*):
            Number of that layer (from 1); `None` if there is none.
        schedule (`SelectionSchedule`, *optional*):
            The schedule of the layers before `next_layer`. A pass with another schedule refuses the cache.
    """

    hidden_states: torch.FloatTensor
    grid_size: tuple[int, int]
    candidate_indices: torch.LongTensor
    selection: tuple[TripsSelection, ...] = ()
    next_layer: int | None = None
    schedule: SelectionSchedule | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors but those of `selection`, by field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "TripsImageCache":
        """Return a cache with the result of `function` in place of each tensor."""
        tensors = {name: function(value) for name, value in self.tensors.items()}
        return replace(self, **tensors, selection=tuple(layer.map(function) for layer in self.selection))

    def __getitem__(self, rows: slice | torch.LongTensor) -> "TripsImageCache":
        return self.map(lambda value: value[rows])

    def after(
        self, hidden_states: torch.Tensor, scored: ScoredTokens | None, texts: GuidingTexts
    ) -> "TripsImageCache":
        """
        Return the tokens after a layer with this result. `texts.image_index` is the row of each text before it, and in
        a single stream `hidden_states` begin with the text.
        """
        if scored is None:
            return replace(self, hidden_states=hidden_states)
        indices = select_rows(self.candidate_indices, texts.image_index)
        indices = indices.to(scored.kept.device)  # layers may be on several devices
        selection = TripsSelection(
            kept_indices=indices.gather(1, scored.kept), scores=scored.scores, candidate_indices=indices
        )
        if not scored.has_own_rows:
            return replace(self, hidden_states=hidden_states, selection=(*self.selection, selection))
        layers_before = [layer.rows(texts.image_index) for layer in self.selection]
        num_candidates = hidden_states.shape[1] - texts.num_tokens_before
        return replace(
            self,
            hidden_states=hidden_states,
            candidate_indices=next_candidates(selection, num_candidates),
            selection=(*layers_before, selection),
        )


@auto_docstring(custom_intro="Output of [`TripsVisionModel`].")
@dataclass
class TripsVisionModelOutput(BaseModelOutputWithPooling):
    r"""
    selection (`tuple(TripsSelection)`):
        One entry per layer of the schedule, in their order. That of a layer which only scores has one row per text if
        a text scores it.
    hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
        They get shorter after each selection layer. With `image_index` they have one row per image up to the first
        layer that a text guides, and one per text after. With `image_cache`, they begin where it ends.
    image_index (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
        The row of each text in the other fields. `None` where text i has row i: without `image_index`, and where a
        text guides a layer that selects.
    """

    selection: tuple[TripsSelection, ...] | None = None
    image_index: torch.LongTensor | None = None


class TripsVisionEmbeddings(nn.Module):
    """[CLS] and patch embeddings plus learned positions, interpolated for images of another size."""

    def __init__(self, config: TripsVisionConfig):
        super().__init__()
        self.config = config
        rows, columns = config.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + rows * columns, config.hidden_size))
        self.patch_embeddings = TripsPatchEmbeddings(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def grid_of(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Return the patches of each image, down and across."""
        patch_height, patch_width = self.config.patch_shape
        height, width = pixel_values.shape[-2:]
        if height % patch_height or width % patch_width or min(height, width) == 0:
            raise ValueError(
                f"The height and width of `pixel_values` must be multiples of the patch size "
                f"({patch_height}x{patch_width}), got {height}x{width}."
            )
        return height // patch_height, width // patch_width

    def interpolated_positions(self, grid_size: tuple[int, int]) -> torch.Tensor:
        """Positions of shape `(1, 1 + rows * columns, hidden_size)`, bicubic as in DeiT and ALBEF."""
        # CODEPATH: images of another size interpolate the positions.
        if grid_size == self.config.grid_size:
            return self.position_embeddings
        class_position = self.position_embeddings[:, :1]
        patch_positions = self.position_embeddings[:, 1:]
        patch_positions = patch_positions.unflatten(1, self.config.grid_size)
        patch_positions = patch_positions.permute(0, 3, 1, 2).float()  # (1, hidden_size, num_rows, num_columns)
        patch_positions = nn.functional.interpolate(
            patch_positions, size=grid_size, mode="bicubic", align_corners=False
        )
        patch_positions = patch_positions.to(class_position.dtype).flatten(2).transpose(1, 2)
        return torch.cat((class_position, patch_positions), dim=1)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the embeddings, `(num_images, 1 + num_patches, hidden_size)`, and the patches down and across."""
        grid_size = self.grid_of(pixel_values)
        dtype = self.patch_embeddings.projection.weight.dtype
        patches = self.patch_embeddings(pixel_values.to(dtype))
        class_token = self.cls_token.expand(patches.shape[0], -1, -1)
        class_token = class_token.to(patches.dtype)  # after `expand`, so that its gradients add up in float32
        embeddings = torch.cat((class_token, patches), dim=1)  # (num_images, 1 + num_patches, hidden_size)
        embeddings = embeddings + self.interpolated_positions(grid_size)
        return self.dropout(embeddings), grid_size


@auto_docstring(
    custom_intro="""
    A Vision Transformer with text-relevant patch selection. Without `text_embeds` it is an image encoder whose patches
    are selected by its own [CLS] token.
    """
)
class TripsVisionModel(TripsPreTrainedModel):
    config: TripsVisionConfig
    main_input_name = "pixel_values"
    input_modalities: tuple[str, ...] = ("image",)
    auto_classes = ("AutoModel",)
    _input_embed_layer = "patch_embeddings"
    _can_record_outputs = {"hidden_states": TripsVisionLayer, "attentions": TripsVisionAttention}

    def __init__(self, config: TripsVisionConfig):
        super().__init__(config)
        config.validate()  # fields may have been set since the configuration was made
        self.embeddings = TripsVisionEmbeddings(config)
        self.pre_layernorm = None
        self.selection_projection = None
        # CODEPATH: CLIP normalises the embeddings before the first layer, ViT and DeiT do not.
        if config.use_pre_layernorm:
            self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # CODEPATH: selection adds parameters only if text and vision differ in width.
        if config.guidance_hidden_size not in (None, config.hidden_size):
            self.selection_projection = nn.Linear(config.guidance_hidden_size, config.hidden_size)
        self.layers = nn.ModuleList(TripsVisionLayer(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, TripsVisionEmbeddings):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)

    def embed_images(self, pixel_values: torch.Tensor) -> TripsImageCache:
        """Return the input of the first layer."""
        hidden_states, grid_size = self.embeddings(pixel_values)
        if self.pre_layernorm is not None:
            hidden_states = self.pre_layernorm(hidden_states)
        num_images, seq_length, _ = hidden_states.shape
        indices = torch.arange(seq_length - 1, device=hidden_states.device)
        return TripsImageCache(
            hidden_states=hidden_states,
            grid_size=grid_size,
            candidate_indices=indices.expand(num_images, -1),
            next_layer=1,
        )

    def encode_images(
        self,
        pixel_values: torch.Tensor,
        schedule: SelectionSchedule | str | None = None,
        keep_rate: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsImageCache:
        """
        Run the layers before the first one that a text scores; all layers if there is none. The result does not depend
        on the text and serves any number of texts.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`): Height and width are
                multiples of the patch size. Positions are interpolated if they are not the configured `image_size`.
            schedule (`SelectionSchedule` or `str`, *optional*): In place of the configuration's.
            keep_rate (`float`, *optional*): Of the schedule's only layer, as in `forward`.

        Returns:
            [`TripsImageCache`], for `forward` at the same selection schedule.

        Raises:
            ValueError: The height or the width does not fit the model, or a layer of the schedule does not exist.
        """
        schedule = resolve_schedule(self.config, schedule, keep_rate)
        stop = schedule.first_text_layer
        image_cache = self.embed_images(pixel_values)
        image_cache = self.run_layers(image_cache, schedule, texts=GuidingTexts(), stop=stop, **kwargs)
        return replace(image_cache, next_layer=stop, schedule=schedule.before(stop))

    def run_layers(
        self,
        image_cache: TripsImageCache,
        schedule: SelectionSchedule,
        texts: GuidingTexts,
        stop: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsImageCache:
        """
        Run the layers from `image_cache.next_layer` up to the one before `stop`, or all the others, and return the
        tokens after them. The first layer that selects by the scores of `texts` gives each text a row of its own.
        """
        tokens = image_cache
        attention_mask = self.padding_mask(tokens.hidden_states, texts)
        end = len(self.layers) + 1
        for number in range(image_cache.next_layer or end, stop or end):
            selection = schedule.by_layer.get(number)
            is_scored_by_text = selection is not None and selection.guidance == "text"
            # Up to the first layer that they score, texts of an image share its row.
            layer_texts = texts if is_scored_by_text else texts._replace(image_index=None)
            hidden_states, scored = self.layers[number - 1](
                tokens.hidden_states,
                texts=layer_texts,
                attention_mask=attention_mask,
                selection=selection,
                **kwargs,
            )
            tokens = tokens.after(hidden_states, scored, layer_texts)
            if scored is not None:
                attention_mask = self.padding_mask(hidden_states, texts)
                if is_scored_by_text and scored.has_own_rows:
                    texts = texts._replace(image_index=None)
        return tokens

    def padding_mask(self, hidden_states: torch.Tensor, texts: GuidingTexts) -> Any:
        """Return the mask of the texts' padding in a single stream, in the form of the attention in use, or `None`."""
        if texts.attention_mask is None:
            return None
        num_image_tokens = hidden_states.shape[1] - texts.length
        mask = joint_padding_mask(texts.attention_mask, num_image_tokens)
        return bidirectional_mask(self.config, mask, inputs_embeds=hidden_states)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring(custom_args=SHARED_ARGS)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_cache: TripsImageCache | None = None,
        schedule: SelectionSchedule | str | None = None,
        keep_rate: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsVisionModelOutput:
        check_image_source(pixel_values, image_cache)
        schedule = resolve_schedule(self.config, schedule, keep_rate)
        if image_cache is None:
            image_cache = self.embed_images(pixel_values)
        elif image_cache.schedule != schedule.before(image_cache.next_layer):
            raise ValueError(
                f"`image_cache` was encoded up to layer {image_cache.next_layer} with the schedule "
                f"{image_cache.schedule}, but the schedule is {schedule}. Encode it again."
            )
        if text_embeds is not None:
            check_counts(text_embeds.shape[0], image_cache.hidden_states.shape[0], image_index)
        # CODEPATH: a text takes part only where it guides or scores a layer.
        is_guided = text_embeds is not None and schedule.first_text_layer is not None
        texts = GuidingTexts()
        if is_guided:
            if self.selection_projection is not None:
                text_embeds = self.selection_projection(text_embeds)
            texts = GuidingTexts(embeds=text_embeds, image_index=image_index)
        tokens = self.run_layers(image_cache, schedule, texts=texts, **kwargs)
        has_own_rows = is_guided and not schedule.scores_only
        hidden_states = self.layernorm(tokens.hidden_states)
        return TripsVisionModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            selection=tokens.selection,
            image_index=None if has_own_rows else image_index,
        )


def next_candidates(selection: TripsSelection, num_candidates: int) -> torch.LongTensor:
    """Return the original indices of the candidates after a selection layer, with -1 for a fused token."""
    num_fused = num_candidates - selection.kept_indices.shape[1]
    return nn.functional.pad(selection.kept_indices, (0, num_fused), value=FUSED_TOKEN)


def scores_of_tokens(selection: TripsSelection, num_tokens: int) -> torch.Tensor:
    """
    Return the scores of the `num_tokens` tokens that a selection layer passes on behind [CLS], `(batch_size,
    num_tokens)`: those of the kept candidates, and the sum of the others for the fused token. Without one, the scores
    of the kept are normalized. Each row sums to 1.
    """
    positions = keep_topk(selection.scores, selection.kept_indices.shape[1])
    scores = selection.scores.gather(1, positions)
    if num_tokens > scores.shape[1]:
        others = selection.scores.scatter(1, positions, 0.0).sum(dim=-1, keepdim=True)
        return torch.cat((scores, others), dim=1)
    return scores / scores.sum(dim=-1, keepdim=True)


# ViLT's form: one stream of text and image tokens


NUM_MODALITIES = 2  # text, image


@auto_docstring(custom_intro="Output of [`TripsSingleStreamModel`].")
@dataclass
class TripsSingleStreamModelOutput(TripsVisionModelOutput):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(num_texts, num_image_tokens, hidden_size)`):
        The remaining image tokens: [CLS], patches, and the fused token.
    pooler_output (`torch.FloatTensor` of shape `(num_texts, hidden_size)`):
        The image's [CLS].
    text_states (`torch.FloatTensor` of shape `(num_texts, text_length, hidden_size)`):
        The text tokens, fused with the image tokens by the attention of every layer.
    hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
        Of the whole sequence: text, the image's [CLS], patches. They get shorter after each selection layer.
    """

    text_states: torch.FloatTensor | None = None


@auto_docstring(
    custom_intro="""
    ViLT's transformer (https://arxiv.org/abs/2102.03334): the layers of a ViT over a text's embeddings, the image's
    [CLS] and its patches, with text-relevant patch selection by the text's [CLS]. It is the vision tower of a
    [`TripsModel`] with `fusion_type="single_stream"`: a [`TripsVisionModel`] with one embedding per modality.
    """
)
class TripsSingleStreamModel(TripsVisionModel):
    config: TripsVisionConfig
    main_input_name = "text_states"
    input_modalities = ("image", "text")

    def __init__(self, config: TripsVisionConfig):
        super().__init__(config)
        self.modality_embeddings = nn.Embedding(NUM_MODALITIES, config.hidden_size)
        self.post_init()

    def encode_images(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> TripsImageCache:
        """As in the parent, without layers: the text takes part in the first one."""
        return self.embed_images(pixel_values)

    def join(self, text_states: torch.Tensor, image_states: torch.Tensor) -> torch.Tensor:
        """Return one sequence of text and image tokens, with the embeddings of their modalities."""
        modalities = torch.arange(NUM_MODALITIES, device=image_states.device)
        text_type, image_type = self.modality_embeddings(modalities)
        text_states = text_states.to(image_states.device)  # the parts may be on several devices
        return torch.cat((text_states + text_type, image_states + image_type), dim=1)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring(custom_args=SHARED_ARGS)
    def forward(
        self,
        text_states: torch.FloatTensor,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_cache: TripsImageCache | None = None,
        schedule: SelectionSchedule | str | None = None,
        keep_rate: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsSingleStreamModelOutput:
        check_image_source(pixel_values, image_cache)
        schedule = resolve_schedule(self.config, schedule, keep_rate)
        if image_cache is None:
            image_cache = self.embed_images(pixel_values)
        check_counts(text_states.shape[0], image_cache.hidden_states.shape[0], image_index)
        image_cache = image_cache.map(lambda tensor: select_rows(tensor, image_index))
        joint_states = self.join(text_states, image_cache.hidden_states)
        text_length = text_states.shape[1]
        texts = GuidingTexts(length=text_length, attention_mask=attention_mask)
        tokens = self.run_layers(replace(image_cache, hidden_states=joint_states), schedule, texts=texts, **kwargs)
        hidden_states = self.layernorm(tokens.hidden_states)  # (num_texts, num_tokens, hidden_size)
        return TripsSingleStreamModelOutput(
            last_hidden_state=hidden_states[:, text_length:],
            pooler_output=hidden_states[:, text_length],
            selection=tokens.selection,
            text_states=hidden_states[:, :text_length],
        )


TripsVisionModel.register_for_auto_class("AutoModel")
TripsSingleStreamModel.register_for_auto_class("AutoModel")
# The vision tower loads from the checkpoint of a whole model, too.
for name in ("TripsVisionModel", "TripsSingleStreamModel"):
    register_checkpoint_conversion_mapping(
        name,
        [PrefixChange(prefix_to_remove="model"), PrefixChange(prefix_to_remove="vision_model")],
        overwrite=True,
    )

__all__ = [
    "TripsPreTrainedModel",
    "TripsSelection",
    "TripsSingleStreamModel",
    "TripsSingleStreamModelOutput",
    "TripsVisionModel",
    "TripsVisionModelOutput",
    "TripsImageCache",
]
