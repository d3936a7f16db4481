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
Layers of the vision tower: patch embeddings, and a pre-norm ViT layer that can select patches, alone and in a single
stream.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_trips import TripsVisionConfig
from .modeling_trips_layers import eager_attention_forward
from .patch_selection import random_scores, score_tokens, select_mass, select_tokens


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
        self, query: torch.Tensor, key: torch.Tensor, guidance: str, candidate_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scores of the candidates, whose keys are `key`, by the guiding token's `query`; or random ones."""
        # CODEPATH: "random" is the floor that every way of selecting must beat.
        if guidance == "random":
            seed = self.config.selection_seed
            return random_scores(key.shape[0], key.shape[2], self.training, key.device, seed, candidate_mask)
        return score_tokens(query, key, self.attention.scaling, candidate_mask)

    def select_and_transform(
        self,
        hidden_states: torch.Tensor,
        scores: torch.Tensor | None,
        keep_rate: float,
        mass: float | None = None,
        min_keep_rate: float = 0.0,
        candidate_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """The MLP half, on the tokens that are left. Without `scores` nothing is selected."""
        kept_positions = new_mask = None
        config = self.config
        rest = {"fuse": config.fuse_inattentive_tokens, "normalize": config.normalize_fusion_weights}
        # CODEPATH: see `selection_mode`.
        if scores is not None and mass is not None:
            hidden_states, kept_positions, new_mask = select_mass(
                hidden_states, scores, mass, keep_rate, min_keep_rate, candidate_mask=candidate_mask, **rest
            )
        elif scores is not None:
            hidden_states, kept_positions = select_tokens(hidden_states, scores, keep_rate, **rest)
        hidden_states = hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return hidden_states, scores, kept_positions, new_mask

    def forward(
        self,
        hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        class_query: torch.Tensor | None = None,
        key: torch.Tensor | None = None,
        keep_rate: float = 1.0,
        guidance: str = "text",
        mass: float | None = None,
        min_keep_rate: float = 0.0,
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
            keep_rate (`float`, *optional*, defaults to 1.0): share of the candidates that goes on.
            guidance (`str`, *optional*, defaults to `"text"`): what ranks them: `"text"`, `"image"` or `"random"`.
            mass, min_keep_rate (`float`, *optional*): where rows keep different numbers: see `select_mass`.
            candidate_mask (`torch.BoolTensor` of shape `(batch_size, num_candidates)`, *optional*): False marks
                padding that an earlier layer left. `attention_mask` hides it, in the form of the attention in use.
            attention_only (`bool`, *optional*, defaults to `False`): whether to stop after the attention half.

        Returns:
            `(hidden_states, scores, kept_positions, candidate_mask)`, the last of the tokens that are left and `None`
            without `mass`, all but the first `None` if nothing is selected; `(None, hidden_states, class_query, key)`
            if `attention_only`.
        """
        if key is None:
            hidden_states, query, key = self.attend(hidden_states, **kwargs)
            class_query = query[:, :, 0]
        if attention_only:
            return None, hidden_states, class_query, key
        scores = None
        if keep_rate < 1.0:
            query = class_query
            # CODEPATH: the image's own [CLS] guides where a text does not, or is not given.
            if guidance == "text" and text_embeds is not None:
                query = self.attention.q_proj(text_embeds).view(class_query.shape)
            scores = self.score(query, key[:, :, 1:], guidance, candidate_mask)
        return self.select_and_transform(hidden_states, scores, keep_rate, mass, min_keep_rate, candidate_mask)


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
        keep_rate: float = 1.0,
        guidance: str = "text",
        mass: float | None = None,
        min_keep_rate: float = 0.0,
        candidate_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor | None, ...]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, text_length + 1 + num_candidates, hidden_size)`)
            text_length (`int`): number of text tokens, padding included.
            attention_mask (`torch.Tensor`, *optional*): hides the padding, in the form of the attention in use.
            keep_rate (`float`, *optional*, defaults to 1.0): share of the candidates that goes on.
            guidance, mass, min_keep_rate, candidate_mask: as in [`TripsVisionLayer`].

        Returns:
            `(hidden_states, scores, kept_positions, candidate_mask)`, as there.
        """
        hidden_states, query, key = self.attend(hidden_states, attention_mask, **kwargs)
        scores = None
        if keep_rate < 1.0:
            # CODEPATH: the text's [CLS] comes first, the image's own behind the text.
            guide = 0 if guidance == "text" else text_length
            scores = self.score(query[:, :, guide], key[:, :, text_length + 1 :], guidance, candidate_mask)
        return self.select_and_transform(hidden_states, scores, keep_rate, mass, min_keep_rate, candidate_mask)
