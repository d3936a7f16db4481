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
"""Layers of the vision tower: a pre-norm ViT layer that can select patches, alone and in a single stream."""

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
from .patch_selection import random_scores, score_tokens, select_tokens


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

    def score(self, query: torch.Tensor, key: torch.Tensor, guidance: str) -> torch.Tensor:
        """Scores of the candidates, whose keys are `key`, by the guiding token's `query`; or random ones."""
        # CODEPATH: "random" is the floor that every way of selecting must beat.
        if guidance == "random":
            return random_scores(key.shape[0], key.shape[2], self.training, key.device, self.config.selection_seed)
        return score_tokens(query, key, self.attention.scaling)

    def select_and_transform(
        self, hidden_states: torch.Tensor, scores: torch.Tensor | None, keep_rate: float
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The MLP half, on the tokens that are left. Without `scores` nothing is selected."""
        kept_positions = None
        if scores is not None:
            hidden_states, kept_positions = select_tokens(
                hidden_states,
                scores,
                keep_rate,
                fuse=self.config.fuse_inattentive_tokens,
                normalize=self.config.normalize_fusion_weights,
            )
        hidden_states = hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return hidden_states, scores, kept_positions

    def forward(
        self,
        hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        class_query: torch.Tensor | None = None,
        key: torch.Tensor | None = None,
        keep_rate: float = 1.0,
        guidance: str = "text",
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
            attention_only (`bool`, *optional*, defaults to `False`): whether to stop after the attention half.

        Returns:
            `(hidden_states, scores, kept_positions)`, the last two `None` if nothing is selected; `(None,
            hidden_states, class_query, key)` if `attention_only`.
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
            scores = self.score(query, key[:, :, 1:], guidance)
        return self.select_and_transform(hidden_states, scores, keep_rate)


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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, text_length + 1 + num_candidates, hidden_size)`)
            text_length (`int`): number of text tokens, padding included.
            attention_mask (`torch.Tensor`, *optional*): hides the padding, in the form of the attention in use.
            keep_rate (`float`, *optional*, defaults to 1.0): share of the candidates that goes on.
            guidance (`str`, *optional*, defaults to `"text"`): as in [`TripsVisionLayer`].

        Returns:
            `(hidden_states, scores, kept_positions)`, the last two `None` if nothing is selected.
        """
        hidden_states, query, key = self.attend(hidden_states, attention_mask, **kwargs)
        scores = None
        if keep_rate < 1.0:
            # CODEPATH: the text's [CLS] comes first, the image's own behind the text.
            guide = 0 if guidance == "text" else text_length
            scores = self.score(query[:, :, guide], key[:, :, text_length + 1 :], guidance)
        return self.select_and_transform(hidden_states, scores, keep_rate)
