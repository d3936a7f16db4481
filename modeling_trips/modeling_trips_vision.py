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
The image side of TRIPS: a Vision Transformer whose selection layers drop the patches that the text does not need,
alone or in a single stream with the text (ViLT's form).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_trips import LayerSelection, SelectionSchedule, TripsVisionConfig
from .modeling_trips_text import (
    TripsPreTrainedModel,
    bidirectional_mask,
    check_counts,
    check_image_source,
    eager_attention_forward,
    joint_padding_mask,
)
from .patch_selection import FUSED_TOKEN, PADDING, random_scores, score_tokens, select_mass, select_tokens


class TripsBatchNorm(nn.BatchNorm2d):
    """Statistics of a frozen norm stay, too: adapters that are trained on a frozen model do not hold them."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.weight.requires_grad or not self.training:
            return super().forward(hidden_states)
        return nn.functional.batch_norm(
            hidden_states, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class TripsConvolutionalStem(nn.Module):
    """
    3x3 convolutions of stride 2, each with twice the channels of the one before, batch-normalised, that take an image
    down to its patch grid (https://arxiv.org/abs/2106.14881).
    """

    def __init__(self, config: TripsVisionConfig):
        super().__init__()
        num_layers = config.patch_shape[0].bit_length() - 1
        widths = [config.hidden_size // 2 ** (num_layers - 1 - i) for i in range(num_layers)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(in_width, width, kernel_size=3, stride=2, padding=1, bias=False)
            for in_width, width in zip([config.num_channels, *widths], widths)
        )
        self.norms = nn.ModuleList(TripsBatchNorm(width) for width in widths)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        for convolution, norm in zip(self.convolutions, self.norms):
            pixel_values = nn.functional.relu(norm(convolution(pixel_values)))
        return pixel_values


class TripsPatchEmbeddings(nn.Module):
    """Images `(num_images, num_channels, height, width)` -> patches `(num_images, num_patches, hidden_size)`."""

    def __init__(self, config: TripsVisionConfig):
        super().__init__()
        # CODEPATH: "linear" is the patch embedding of ViT, "convolutional" a stem for training from scratch.
        convolutional = config.patch_embedding_type == "convolutional"
        self.stem = TripsConvolutionalStem(config) if convolutional else None
        self.projection = nn.Conv2d(
            in_channels=config.hidden_size if convolutional else config.num_channels,
            out_channels=config.hidden_size,
            kernel_size=1 if convolutional else config.patch_size,
            stride=1 if convolutional else config.patch_size,
            bias=config.patch_bias,
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.stem is not None:
            pixel_values = self.stem(pixel_values)
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class TripsVisionAttention(nn.Module):
    """Self-attention of the ViT. Its queries and keys are returned too, for patch selection."""

    def __init__(self, config: TripsVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False

        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`(batch_size, seq_length, hidden_size)` -> `(batch_size, num_heads, seq_length, head_dim)`."""
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        query = self.split_heads(self.q_proj(hidden_states))
        key = self.split_heads(self.k_proj(hidden_states))
        value = self.split_heads(self.v_proj(hidden_states))
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = self.o_proj(attn_output.reshape(hidden_states.shape).contiguous())
        return attn_output, attn_weights, query, key


class TripsVisionMLP(nn.Module):
    def __init__(self, config: TripsVisionConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class TripsVisionLayer(GradientCheckpointingLayer):
    """
    A pre-norm ViT layer in two halves, attention and MLP. Patches are selected between them (paper, section 3.2), so
    the MLP already runs on the shorter sequence.

    Both halves go through `forward`, on which FSDP, device maps and gradient checkpointing hook. Every tensor with a
    gradient is an argument by position and an item of the result: reentrant checkpointing sees no others.
    """

    def __init__(self, config: TripsVisionConfig):
        super().__init__()
        self.config = config
        self.attention = TripsVisionAttention(config)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TripsVisionMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def attend(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The attention half: hidden states, and the queries and keys of all tokens."""
        attn_output, _, query, key = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        return hidden_states + self.dropout(attn_output), query, key

    def score(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        selection: LayerSelection,
        candidate_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores of the candidates, whose keys are `key`, by the guiding token's `query`; or random ones."""
        if selection.guidance == "random":
            return random_scores(key.shape[0], key.shape[2], self.training, key.device, selection.seed, candidate_mask)
        return score_tokens(query, key, self.attention.scaling, candidate_mask)

    def select_and_transform(
        self,
        hidden_states: torch.Tensor,
        scores: torch.Tensor | None,
        selection: LayerSelection | None,
        candidate_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """The MLP half, on the tokens that are left. Without `scores` nothing is selected."""
        kept_positions = new_mask = None
        if scores is not None:
            rest = {"fuse": selection.fuse, "normalize": selection.normalize}
            if selection.mass is None:
                hidden_states, kept_positions = select_tokens(hidden_states, scores, selection.keep_rate, **rest)
            else:
                bounds = (selection.mass, selection.keep_rate, selection.min_keep_rate)
                hidden_states, kept_positions, new_mask = select_mass(
                    hidden_states, scores, *bounds, candidate_mask=candidate_mask, **rest
                )
        hidden_states = hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return hidden_states, scores, kept_positions, new_mask

    def forward(
        self,
        hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        class_query: torch.Tensor | None = None,
        key: torch.Tensor | None = None,
        selection: LayerSelection | None = None,
        candidate_mask: torch.Tensor | None = None,
        attention_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor | None, ...]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, seq_length, hidden_size)`): the layer's input; with
                `class_query` and `key`, what the attention half left.
            text_embeds (`torch.Tensor` of shape `(batch_size, hidden_size)`, *optional*): the text guidance.
            class_query (`torch.Tensor` of shape `(batch_size, num_heads, head_dim)`, *optional*): the query of [CLS].
            key (`torch.Tensor` of shape `(batch_size, num_heads, seq_length, head_dim)`, *optional*): all keys. With
                it the attention half is not computed again.
            selection ([`LayerSelection`], *optional*): how the layer selects; by default it does not.
            candidate_mask (`torch.BoolTensor` of shape `(batch_size, num_candidates)`, *optional*): False marks
                padding that an earlier layer left. `attention_mask` hides it, in the form of the attention in use.
            attention_only (`bool`, *optional*, defaults to `False`): whether to stop after the attention half.

        Returns:
            `(hidden_states, scores, kept_positions, candidate_mask)`, the last of the tokens that are left and `None`
            with top-k selection, all but the first `None` if nothing is selected; `(None, hidden_states, class_query,
            key)` if `attention_only`.
        """
        if key is None:
            hidden_states, query, key = self.attend(hidden_states, **kwargs)
            class_query = query[:, :, 0]
        if attention_only:
            return None, hidden_states, class_query, key
        scores = None
        if selection is not None:
            query = class_query
            # The image's own [CLS] guides where a text does not, or is not given.
            if selection.guidance == "text" and text_embeds is not None:
                query = self.attention.q_proj(text_embeds).view(class_query.shape)
            scores = self.score(query, key[:, :, 1:], selection, candidate_mask)
        return self.select_and_transform(hidden_states, scores, selection, candidate_mask)


class TripsJointLayer(TripsVisionLayer):
    """
    A layer of a single stream, over the text, the image's [CLS] and the patches. The patches alone are candidates, and
    the text that guides is in the sequence: its [CLS] is the first token.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        text_length: int,
        attention_mask: torch.Tensor | None = None,
        selection: LayerSelection | None = None,
        candidate_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor | None, ...]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, text_length + 1 + num_candidates, hidden_size)`)
            text_length (`int`): number of text tokens, padding included.
            attention_mask (`torch.Tensor`, *optional*): hides the padding, in the form of the attention in use.
            selection, candidate_mask: as in [`TripsVisionLayer`].

        Returns:
            `(hidden_states, scores, kept_positions, candidate_mask)`, as there.
        """
        hidden_states, query, key = self.attend(hidden_states, attention_mask, **kwargs)
        scores = None
        if selection is not None:
            # The text's [CLS] comes first, the image's own behind the text.
            guide = 0 if selection.guidance == "text" else text_length
            scores = self.score(query[:, :, guide], key[:, :, text_length + 1 :], selection, candidate_mask)
        return self.select_and_transform(hidden_states, scores, selection, candidate_mask)


@auto_docstring(custom_intro="What one selection layer kept.")
@dataclass
class TripsSelection(ModelOutput):
    r"""
    kept_indices (`torch.LongTensor` of shape `(batch_size, num_kept)`):
        The candidates that went on, in order: row-major index of each patch in the original grid, -1 for the fused
        token of an earlier selection layer, -2 for padding, where rows keep different numbers
        (`selection_mode="mass"`).
    scores (`torch.FloatTensor` of shape `(batch_size, num_candidates)`):
        The scores of all candidates of this layer, in order. Each row sums to 1; padding has 0.
    candidate_indices (`torch.LongTensor` of shape `(batch_size, num_candidates)`):
        The original index of each candidate, -1 for a fused token, -2 for padding.
    """

    kept_indices: torch.LongTensor | None = None
    scores: torch.FloatTensor | None = None
    candidate_indices: torch.LongTensor | None = None


@auto_docstring(custom_intro="The text-independent part of the vision tower's work, computed once per image.")
@dataclass
class TripsImageCache(ModelOutput):
    r"""
    hidden_states (`torch.FloatTensor` of shape `(num_images, 1 + num_candidates, hidden_size)`):
        [CLS] and candidates after the attention half of the first layer that a text guides; after the last layer if
        there is none.
    class_query (`torch.FloatTensor` of shape `(num_images, num_heads, head_dim)`, *optional*):
        The query of [CLS] in that layer: the guidance where no text is given.
    key (`torch.FloatTensor` of shape `(num_images, num_heads, 1 + num_candidates, head_dim)`, *optional*):
        The keys of that layer, which the guiding query is scored against.
    candidate_indices (`torch.LongTensor` of shape `(num_images, num_candidates)`):
        The original index of each candidate, -1 for a fused token, -2 for padding.
    selection (`tuple(TripsSelection)`):
        What the selection layers before it kept.
    next_layer (`int`, *optional*):
        Number of that layer (from 1); `None` if there is none.
    grid_size (`tuple(int, int)`):
        Patches of each image, down and across.
    candidate_mask (`torch.BoolTensor` of shape `(num_images, num_candidates)`, *optional*):
        False marks padding; `None` where there is none.
    schedule (`SelectionSchedule`):
        The schedule of the layers before `next_layer`. A model with another schedule refuses the cache.
    """

    hidden_states: torch.FloatTensor | None = None
    class_query: torch.FloatTensor | None = None
    key: torch.FloatTensor | None = None
    candidate_indices: torch.LongTensor | None = None
    selection: tuple[TripsSelection, ...] | None = None
    next_layer: int | None = None
    grid_size: tuple[int, int] | None = None
    candidate_mask: torch.BoolTensor | None = None
    schedule: SelectionSchedule | None = None


@auto_docstring(custom_intro="Output of [`TripsVisionModel`].")
@dataclass
class TripsVisionModelOutput(BaseModelOutputWithPooling):
    r"""
    selection (`tuple(TripsSelection)`):
        One entry per selection layer with a keep rate below 1, in the order of the layers.
    hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
        They get shorter behind each selection layer. With `image_index` they have one row per image up to the first
        layer that a text guides, and one per text after. With `image_cache`, they begin where it ends.
    image_index (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
        The row of each text, where all texts of an image have one in common: see `repeat_images` of the model.
    attention_mask (`torch.BoolTensor` of shape `(num_rows, num_image_tokens)`, *optional*):
        False marks padding of `last_hidden_state`, where rows keep different numbers of tokens
        (`selection_mode="mass"`).
    """

    selection: tuple[TripsSelection, ...] | None = None
    image_index: torch.LongTensor | None = None
    attention_mask: torch.BoolTensor | None = None


class TripsVisionEmbeddings(nn.Module):
    """[CLS] and patch embeddings plus learned positions, interpolated to the image's own grid where it differs."""

    def __init__(self, config: TripsVisionConfig):
        super().__init__()
        self.config = config
        rows, columns = config.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + rows * columns, config.hidden_size))
        self.patch_embeddings = TripsPatchEmbeddings(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def grid_of(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        patch_height, patch_width = self.config.patch_shape
        num_channels, height, width = pixel_values.shape[1:]
        if num_channels != self.config.num_channels:
            raise ValueError(f"`pixel_values` must have {self.config.num_channels} channels, got {num_channels}.")
        if height % patch_height or width % patch_width or min(height, width) == 0:
            raise ValueError(
                f"The height and width of `pixel_values` must be multiples of the patch size "
                f"({patch_height}x{patch_width}), got {height}x{width}."
            )
        return height // patch_height, width // patch_width

    def interpolated_positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """Positions of shape `(1, 1 + rows * columns, hidden_size)`, bicubic as in DeiT and ALBEF."""
        # CODEPATH: images of the configured size take the positions as they are; all others interpolate them.
        if grid == self.config.grid_size:
            return self.position_embeddings
        class_position, patch_positions = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        patch_positions = patch_positions.unflatten(1, self.config.grid_size).permute(0, 3, 1, 2)
        patch_positions = nn.functional.interpolate(
            patch_positions.float(), size=grid, mode="bicubic", align_corners=False
        ).to(class_position.dtype)
        return torch.cat((class_position, patch_positions.flatten(2).transpose(1, 2)), dim=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        grid = self.grid_of(pixel_values)
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.projection.weight.dtype))
        class_token = self.cls_token.expand(patches.shape[0], -1, -1).to(patches.dtype)
        return self.dropout(torch.cat((class_token, patches), dim=1) + self.interpolated_positions(grid))


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
    layer_class = TripsVisionLayer

    def __init__(self, config: TripsVisionConfig):
        super().__init__(config)
        config.validate()  # fields may have been set since the configuration was made
        self.schedule = config.schedule
        self.embeddings = TripsVisionEmbeddings(config)
        self.pre_layernorm = self.selection_projection = None
        # CODEPATH: CLIP normalises the embeddings before the first layer, ViT and DeiT do not.
        if config.use_pre_layernorm:
            self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # CODEPATH: the only parameter that selection ever adds, where text and vision differ in width.
        if config.guidance_hidden_size not in (None, config.hidden_size):
            self.selection_projection = nn.Linear(config.guidance_hidden_size, config.hidden_size)
        self.layers = nn.ModuleList(self.layer_class(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, TripsVisionEmbeddings):
            init.trunc_normal_(module.cls_token, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)

    def unused_parameters(self) -> list[nn.Parameter]:
        """As in the parent."""
        fuses_by_text = self.schedule.first_text_layer is not None and self.config.fuse_inattentive_tokens
        # CODEPATH: the text gets a gradient from the weights of fused tokens alone, which unpruned models have not.
        if self.selection_projection is None or fuses_by_text:
            return []
        return list(self.selection_projection.parameters())

    def encode_images(
        self, pixel_values: torch.Tensor, select_patches: bool = True, **kwargs: Unpack[TransformersKwargs]
    ) -> TripsImageCache:
        """
        All that does not depend on the text: the layers before the first one that a text guides, the selections of
        those that the image guides included, and the attention half of that layer; the whole tower if there is none.
        Computed once, it serves any number of texts.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`): height and width are
                multiples of the patch size; positions are interpolated if they are not the configured `image_size`.
            select_patches (`bool`, *optional*, defaults to `True`): without, the cache ends before any selection.

        Returns:
            [`TripsImageCache`], for `forward` at the same selection schedule.

        Raises:
            ValueError: if the number of channels, the height or the width does not fit the model.
        """
        hidden_states, grid_size = self.embeddings(pixel_values), self.embeddings.grid_of(pixel_values)
        if self.pre_layernorm is not None:
            hidden_states = self.pre_layernorm(hidden_states)
        num_images, seq_length = hidden_states.shape[:2]
        candidate_indices = torch.arange(seq_length - 1, device=hidden_states.device).expand(num_images, -1)
        next_layer = self.schedule.first_text_layer if select_patches else self.schedule.first_layer
        numbers = range(1, next_layer or len(self.layers) + 1)
        hidden_states, candidate_indices, candidate_mask, selection = self.run_layers(
            numbers, hidden_states, candidate_indices, **kwargs
        )
        class_query = key = None
        if next_layer is not None:
            mask = self.padding_mask(hidden_states, candidate_mask)
            _, hidden_states, class_query, key = self.layers[next_layer - 1](
                hidden_states, attention_mask=mask, attention_only=True, **kwargs
            )
        return TripsImageCache(
            hidden_states,
            class_query,
            key,
            candidate_indices,
            selection,
            next_layer,
            grid_size,
            candidate_mask,
            self.schedule.before(next_layer),
        )

    def padding_mask(self, hidden_states: torch.Tensor, candidate_mask: torch.Tensor | None):
        """Hides the padding among [CLS] and the candidates, in the form that the attention in use wants."""
        if candidate_mask is None:
            return None
        return bidirectional_mask(self.config, with_class_token(candidate_mask), inputs_embeds=hidden_states)

    def run_layers(
        self,
        numbers: range,
        hidden_states: torch.Tensor,
        candidate_indices: torch.LongTensor,
        candidate_mask: torch.BoolTensor | None = None,
        text_embeds: torch.Tensor | None = None,
        class_query: torch.Tensor | None = None,
        key: torch.Tensor | None = None,
        select_patches: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.LongTensor, torch.BoolTensor | None, tuple[TripsSelection, ...]]:
        """
        The layers `numbers`, row i under the guidance of row i of `text_embeds`. With `class_query` and `key`, the
        attention half of the first of them was computed before. Returns hidden states, the original indices of the
        candidates behind [CLS], which of these are no padding, and what was selected.
        """
        by_layer, selections = self.schedule.by_layer if select_patches else {}, []
        mask = self.padding_mask(hidden_states, candidate_mask)
        for number in numbers:
            hidden_states, scores, kept_positions, new_mask = self.layers[number - 1](
                hidden_states,
                text_embeds,
                class_query,
                key,
                selection=by_layer.get(number),
                candidate_mask=candidate_mask,
                attention_mask=mask,
                **kwargs,
            )
            class_query = key = None
            if kept_positions is not None:
                selections.append(selection_of(scores, kept_positions, candidate_indices, new_mask))
                candidate_indices = next_candidates(selections[-1], hidden_states.shape[1] - 1, new_mask)
                candidate_mask, mask = new_mask, self.padding_mask(hidden_states, new_mask)
        return hidden_states, candidate_indices, candidate_mask, tuple(selections)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_cache: TripsImageCache | None = None,
        select_patches: bool = True,
        repeat_images: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsVisionModelOutput:
        r"""
        text_embeds (`torch.FloatTensor` of shape `(num_texts, guidance_hidden_size)`, *optional*):
            The text guidance t: the [CLS] output of the text encoder. Without it the image guides itself.
        image_index (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
            Text i looks at image `image_index[i]`. By default text i looks at image i.
        image_cache (`TripsImageCache`, *optional*):
            Result of `encode_images`, in place of `pixel_values`.
        select_patches (`bool`, *optional*, defaults to `True`):
            Whether the selection layers select. Without, all patches go on: a plain ViT.
        repeat_images (`bool`, *optional*, defaults to `True`):
            Whether each text has a row of its own where no text plays a part. Without, there is one per image, and
            `image_index` of the output says which is each text's.
        """
        check_image_source(pixel_values, image_cache)
        if image_cache is None:
            image_cache = self.encode_images(pixel_values, select_patches, **kwargs)
        self.check_image_cache(image_cache, select_patches)
        if text_embeds is not None:
            check_counts(text_embeds.shape[0], image_cache.hidden_states.shape[0], image_index)
        # CODEPATH: a text plays a part only where it guides a layer.
        if self.schedule.first_text_layer is None or not select_patches:
            text_embeds = None
        if text_embeds is not None and image_index is not None:
            image_cache, image_index = select_rows(image_cache, image_index), None
        if text_embeds is not None and self.selection_projection is not None:
            text_embeds = self.selection_projection(text_embeds)
        hidden_states, _, candidate_mask, selection = self.run_layers(
            range(image_cache.next_layer or len(self.layers) + 1, len(self.layers) + 1),
            image_cache.hidden_states,
            image_cache.candidate_indices,
            image_cache.candidate_mask,
            text_embeds,
            image_cache.class_query,
            image_cache.key,
            select_patches,
            **kwargs,
        )
        hidden_states = self.layernorm(hidden_states)
        output = TripsVisionModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            selection=(image_cache.selection or ()) + selection,
            image_index=image_index,
            attention_mask=with_class_token(candidate_mask),
        )
        return repeated(output) if repeat_images else output

    def check_image_cache(self, image_cache: TripsImageCache, select_patches: bool):
        """Raise a `ValueError` if the cache has another schedule, or dropped patches and `select_patches` is off."""
        schedule = self.schedule
        if image_cache.next_layer not in (schedule.first_layer, schedule.first_text_layer) or (
            image_cache.schedule != schedule.before(image_cache.next_layer)
        ):
            raise ValueError(
                f"`image_cache` was encoded up to layer {image_cache.next_layer} with the schedule "
                f"{image_cache.schedule}, the model has the schedule {schedule}. Encode it again."
            )
        if image_cache.selection and not select_patches:
            raise ValueError("Patches were dropped in `image_cache`: encode it again with `select_patches=False`.")


@contextmanager
def use_schedule(model: TripsPreTrainedModel, schedule: SelectionSchedule) -> Iterator[None]:
    """
    Let a model select by another schedule while the context is open. Its configuration stays as it is.

    Args:
        model ([`TripsPreTrainedModel`]): A vision tower, or a model that has one.
        schedule ([`SelectionSchedule`])

    Raises:
        ValueError: The tower has fewer layers.
    """
    tower = getattr(model.base_model, "vision_model", model.base_model)
    schedule.check_fits(len(tower.layers))
    own, tower.schedule = tower.schedule, schedule
    try:
        yield
    finally:
        tower.schedule = own


def repeated(output: TripsVisionModelOutput) -> TripsVisionModelOutput:
    """The output with a row for each text, where rows are of images."""
    index = output.image_index
    if index is None:
        return output
    last_hidden_state = select_rows(output.last_hidden_state, index)
    return TripsVisionModelOutput(
        last_hidden_state=last_hidden_state,
        pooler_output=last_hidden_state[:, 0],
        hidden_states=output.hidden_states,
        attentions=output.attentions,
        selection=select_rows(output.selection, index),
        attention_mask=select_rows(output.attention_mask, index),
    )


def with_class_token(candidate_mask: torch.BoolTensor | None) -> torch.BoolTensor | None:
    """The mask of [CLS] and the candidates."""
    return None if candidate_mask is None else nn.functional.pad(candidate_mask, (1, 0), value=True)


def selection_of(
    scores: torch.Tensor,
    kept_positions: torch.LongTensor,
    candidate_indices: torch.LongTensor,
    candidate_mask: torch.BoolTensor | None = None,
) -> TripsSelection:
    """What a layer kept, given the original index of each of its candidates, and the mask of those behind it."""
    candidate_indices = candidate_indices.to(kept_positions.device)  # layers may lie on several devices
    kept_indices = candidate_indices.gather(1, kept_positions)
    if candidate_mask is not None:
        kept_indices = kept_indices.masked_fill(~candidate_mask[:, : kept_indices.shape[1]], PADDING)
    return TripsSelection(kept_indices, scores, candidate_indices)


def next_candidates(
    selection: TripsSelection, num_candidates: int, candidate_mask: torch.BoolTensor | None = None
) -> torch.LongTensor:
    """Original indices of the candidates behind a selection layer: those that it kept, and -1 for a fused token."""
    num_kept = selection.kept_indices.shape[1]
    indices = nn.functional.pad(selection.kept_indices, (0, num_candidates - num_kept), value=FUSED_TOKEN)
    return indices if candidate_mask is None else indices.masked_fill(~candidate_mask, PADDING)


def select_rows(value, index: torch.LongTensor):
    """The rows `index` of a tensor, or of each in a model output or a tuple of them; what is no tensor stays."""
    if isinstance(value, torch.Tensor):
        return value.index_select(0, index.to(value.device))
    if isinstance(value, ModelOutput):
        return type(value)(**{name: select_rows(item, index) for name, item in value.items()})
    return tuple(select_rows(item, index) for item in value) if isinstance(value, tuple) else value


TripsVisionModel.register_for_auto_class("AutoModel")
# The vision tower loads from the checkpoint of a whole model, too.
register_checkpoint_conversion_mapping(
    "TripsVisionModel",
    [PrefixChange(prefix_to_remove="model"), PrefixChange(prefix_to_remove="vision_model")],
    overwrite=True,
)


# ViLT's form: one stream of text and image tokens


NUM_MODALITIES = 2  # text, image


@auto_docstring(custom_intro="Output of [`TripsSingleStreamModel`].")
@dataclass
class TripsSingleStreamModelOutput(TripsVisionModelOutput):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(num_texts, num_image_tokens, hidden_size)`):
        The image tokens that selection left: [CLS], patches, and the fused token.
    pooler_output (`torch.FloatTensor` of shape `(num_texts, hidden_size)`):
        The image's [CLS].
    text_states (`torch.FloatTensor` of shape `(num_texts, text_length, hidden_size)`):
        The text tokens. They are fused states: they attended to the image tokens in every layer.
    hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
        Of the whole sequence: text, the image's [CLS], patches. They get shorter behind each selection layer.
    """

    text_states: torch.FloatTensor | None = None


@auto_docstring(
    custom_intro="""
    ViLT's transformer (https://arxiv.org/abs/2102.03334): the layers of a ViT over a text's embeddings, the image's
    [CLS] and its patches, with text-relevant patch selection. The text guides by its own [CLS], the first token of the
    sequence; only patches are candidates. It is the vision tower of a [`TripsModel`] with
    `fusion_type="single_stream"`, and has the weights of a [`TripsVisionModel`] and one embedding per modality.
    """
)
class TripsSingleStreamModel(TripsVisionModel):
    config: TripsVisionConfig
    main_input_name = "text_states"
    input_modalities = ("image", "text")
    layer_class = TripsJointLayer

    def __init__(self, config: TripsVisionConfig):
        super().__init__(config)
        self.modality_embeddings = nn.Embedding(NUM_MODALITIES, config.hidden_size)
        self.post_init()

    def encode_images(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> TripsImageCache:
        """
        All that does not depend on the text: the embeddings, no layer, as the text takes part in the first one.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`): as in
                [`TripsVisionModel.encode_images`].

        Returns:
            [`TripsImageCache`], for `forward`.
        """
        return TripsImageCache(self.embeddings(pixel_values), grid_size=self.embeddings.grid_of(pixel_values))

    def join(self, text_states: torch.Tensor, image_states: torch.Tensor) -> torch.Tensor:
        """One sequence of text and image tokens, each with the embedding of its modality."""
        modalities = torch.arange(NUM_MODALITIES, device=image_states.device)
        text_type, image_type = self.modality_embeddings(modalities)
        text_states = text_states.to(image_states.device)  # the parts may lie on several devices
        return torch.cat((text_states + text_type, image_states + image_type), dim=1)

    def joint_mask(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        text_length: int,
        candidate_mask: torch.Tensor | None = None,
    ):
        """The mask of the sequence as long as it is now, in the form that the attention in use wants."""
        image_tokens = (with_class_token(candidate_mask), hidden_states.shape[1] - text_length)
        mask = joint_padding_mask((attention_mask, text_length), image_tokens)
        return bidirectional_mask(self.config, mask, inputs_embeds=hidden_states)

    def encode_pairs(
        self,
        text_states: torch.Tensor,
        image_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.BoolTensor | None, tuple[TripsSelection, ...]]:
        """
        All layers, on row i of `text_states` and row i of `image_states`: hidden states, which candidates are no
        padding, and what was selected.
        """
        text_length = text_states.shape[1]
        hidden_states, selections = self.join(text_states, image_states), []
        mask = self.joint_mask(hidden_states, attention_mask, text_length)
        num_texts, num_candidates = hidden_states.shape[0], hidden_states.shape[1] - text_length - 1
        candidate_indices = torch.arange(num_candidates, device=hidden_states.device).expand(num_texts, -1)
        by_layer, candidate_mask = self.schedule.by_layer, None
        for number, layer in enumerate(self.layers, start=1):
            hidden_states, scores, kept_positions, new_mask = layer(
                hidden_states,
                text_length,
                mask,
                selection=by_layer.get(number),
                candidate_mask=candidate_mask,
                **kwargs,
            )
            if kept_positions is not None:
                num_candidates, candidate_mask = hidden_states.shape[1] - text_length - 1, new_mask
                selections.append(selection_of(scores, kept_positions, candidate_indices, candidate_mask))
                candidate_indices = next_candidates(selections[-1], num_candidates, candidate_mask)
                mask = self.joint_mask(hidden_states, attention_mask, text_length, candidate_mask)
        return hidden_states, candidate_mask, tuple(selections)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        text_states: torch.FloatTensor,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_cache: TripsImageCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsSingleStreamModelOutput:
        r"""
        text_states (`torch.FloatTensor` of shape `(num_texts, text_length, hidden_size)`):
            Embeddings of the texts. The first token, [CLS], guides: pad texts on the right.
        attention_mask (`torch.Tensor` of shape `(num_texts, text_length)`, *optional*):
            0 marks padding of the texts.
        image_index (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
            Text i is joined with image `image_index[i]`. By default text i with image i.
        image_cache (`TripsImageCache`, *optional*):
            Result of `encode_images`, in place of `pixel_values`.
        """
        check_image_source(pixel_values, image_cache)
        image_states = (
            self.encode_images(pixel_values, **kwargs) if image_cache is None else image_cache
        ).hidden_states
        check_counts(text_states.shape[0], image_states.shape[0], image_index)
        if image_index is not None:
            image_states = image_states.index_select(0, image_index.to(image_states.device))
        hidden_states, candidate_mask, selection = self.encode_pairs(
            text_states, image_states, attention_mask, **kwargs
        )
        hidden_states = self.layernorm(hidden_states)
        text_length = text_states.shape[1]
        return TripsSingleStreamModelOutput(
            last_hidden_state=hidden_states[:, text_length:],
            pooler_output=hidden_states[:, text_length],
            selection=selection,
            attention_mask=with_class_token(candidate_mask),
            text_states=hidden_states[:, :text_length],
        )


TripsSingleStreamModel.register_for_auto_class("AutoModel")
register_checkpoint_conversion_mapping(
    "TripsSingleStreamModel",
    [PrefixChange(prefix_to_remove="model"), PrefixChange(prefix_to_remove="vision_model")],
    overwrite=True,
)

__all__ = [
    "TripsSelection",
    "TripsSingleStreamModel",
    "TripsSingleStreamModelOutput",
    "TripsVisionModel",
    "TripsVisionModelOutput",
    "TripsImageCache",
    "use_schedule",
]
