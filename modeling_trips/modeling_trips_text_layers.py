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
"""Layers of the language side: BERT's post-norm layer, with cross-attention or joined with image tokens."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_trips import TripsDecoderConfig, TripsFusionConfig, TripsTextConfig
from .modeling_trips_layers import check_text_length, eager_attention_forward


class TripsTextEmbeddings(nn.Module):
    """Word, position and token type embeddings, with BERT's parameter names."""

    def __init__(self, config: TripsTextConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache_length: int | torch.Tensor = 0,
    ) -> torch.Tensor:
        """`cache_length`: number of tokens before the first one given, which are in the decoder's cache."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Specify exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        batch_size, seq_length = inputs_embeds.shape[:2]
        self.check_length(seq_length, cache_length)
        position_ids = torch.arange(seq_length, device=inputs_embeds.device) + cache_length
        if token_type_ids is None:
            token_type_ids = torch.zeros((batch_size, seq_length), dtype=torch.long, device=inputs_embeds.device)
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids)
        embeddings = embeddings + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))

    def check_length(self, seq_length: int, cache_length: int | torch.Tensor):
        # A static cache counts on the device: asking it would sync with the host.
        length = seq_length + cache_length if isinstance(cache_length, int) else seq_length
        check_text_length(length, self.position_embeddings.num_embeddings)


class TripsTextSelfAttention(nn.Module):
    """BERT's attention over the text itself, causal in the decoder."""

    def __init__(self, config: TripsTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = config.is_decoder

        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(self.source_hidden_size, config.hidden_size)
        self.value = nn.Linear(self.source_hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    @property
    def source_hidden_size(self) -> int:
        """Width of the states that give keys and values."""
        return self.config.hidden_size

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def key_value(self, hidden_states: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self.split_heads(self.key(hidden_states)), self.split_heads(self.value(hidden_states))
        if cache is not None:
            cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            key, value = cache.update(key, value, self.layer_idx)
        return key, value

    def forward(
        self,
        hidden_states: torch.Tensor,
        source_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        source_index: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`source_index`: row i reads row `source_index[i]` of `source_states`, by default row i."""
        query = self.split_heads(self.query(hidden_states))
        key, value = self.key_value(source_states, cache)
        if source_index is not None:
            key, value = (states.index_select(0, source_index.to(states.device)) for states in (key, value))
        attn_output, attn_weights = self.attend(query, key, value, attention_mask, **kwargs)
        return attn_output.reshape(hidden_states.shape).contiguous(), attn_weights

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )


def unpad_keys(
    key: torch.Tensor, value: torch.Tensor, padding_mask: torch.Tensor, query_length: int
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """
    The keys and values of all rows in one sequence, without padding, and where each row's begin: flash attention's
    arguments. `(batch_size, num_heads, key_length, head_dim)` -> `(1, num_heads, num_keys, head_dim)`.
    """
    key, value = (states.transpose(1, 2)[padding_mask].transpose(0, 1).unsqueeze(0) for states in (key, value))
    batch_size, key_length = padding_mask.shape
    ends = padding_mask.sum(dim=-1).cumsum(dim=0, dtype=torch.int32)
    starts_of_queries = query_length * torch.arange(batch_size + 1, dtype=torch.int32, device=key.device)
    return (
        key,
        value,
        {
            "cu_seq_lens_q": starts_of_queries,
            "cu_seq_lens_k": nn.functional.pad(ends, (1, 0)),
            "max_length_q": query_length,
            "max_length_k": key_length,
        },
    )


class TripsTextCrossAttention(TripsTextSelfAttention):
    """Attention of the text to other states: keys and values are computed once and cached."""

    def __init__(self, config: TripsFusionConfig | TripsDecoderConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False

    @property
    def source_hidden_size(self) -> int:
        return self.config.cross_attention_hidden_size

    def key_value(self, hidden_states: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, torch.Tensor]:
        if cache is None:
            return super().key_value(hidden_states, None)
        if cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        cache.is_updated[self.layer_idx] = True
        return super().key_value(hidden_states, cache.cross_attention_cache)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Flash attention's mask, of shape (batch_size, key_length): given that, it would drop queries, too.
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            key, value, lengths = unpad_keys(key, value, attention_mask.bool(), query_length=query.shape[2])
            return super().attend(query, key, value, None, **lengths, **kwargs)
        return super().attend(query, key, value, attention_mask, **kwargs)

    def cls_attention(
        self, hidden_states: torch.Tensor, source_states: torch.Tensor, source_index: torch.LongTensor | None = None
    ) -> torch.Tensor:
        """
        How much [CLS] attends to each of the other states, padding among them: `(num_texts, num_heads, num_tokens)`,
        float32. Fast attention does not tell.
        """
        query = self.split_heads(self.query(hidden_states[:, :1]))
        key = self.split_heads(self.key(source_states))
        if source_index is not None:
            key = key.index_select(0, source_index.to(key.device))
        return (query @ key.transpose(2, 3) * self.scaling).float().softmax(dim=-1)[:, :, 0]


class TripsTextOutput(nn.Module):
    """Projection, residual and post-norm, with BERT's parameter names: the end of attention and of feed-forward."""

    def __init__(self, config: TripsTextConfig, input_size: int):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class TripsTextAttention(nn.Module):
    def __init__(self, config: TripsTextConfig, layer_idx: int, attention_class: type[nn.Module]):
        super().__init__()
        self.self = attention_class(config, layer_idx)
        self.output = TripsTextOutput(config, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        source_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        source_index: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self(hidden_states, source_states, attention_mask, cache, source_index, **kwargs)
        return self.output(attn_output, hidden_states)


class TripsTextIntermediate(nn.Module):
    def __init__(self, config: TripsTextConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation_fn(self.dense(hidden_states))


class TripsTextLayer(GradientCheckpointingLayer):
    """BERT's post-norm layer."""

    def __init__(self, config: TripsTextConfig, layer_idx: int):
        super().__init__()
        self.attention = TripsTextAttention(config, layer_idx, TripsTextSelfAttention)
        self.intermediate = TripsTextIntermediate(config)
        self.output = TripsTextOutput(config, config.intermediate_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        hidden_states = self.attention(hidden_states, hidden_states, attention_mask, **kwargs)
        return self.output(self.intermediate(hidden_states), hidden_states)


class TripsCrossLayer(TripsTextLayer):
    """BERT's layer with cross-attention between self-attention and feed-forward, as in ALBEF's upper layers."""

    def __init__(self, config: TripsFusionConfig | TripsDecoderConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.crossattention = TripsTextAttention(config, layer_idx, TripsTextCrossAttention)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        encoder_index: torch.LongTensor | None = None,
        output_cls_attention: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        `encoder_index`: row i reads row `encoder_index[i]` of `encoder_hidden_states`, by default row i. With
        `output_cls_attention` it also returns what `TripsTextCrossAttention.cls_attention` does.
        """
        hidden_states = self.attention(hidden_states, hidden_states, attention_mask, cache, **kwargs)
        cls_attention = None
        if output_cls_attention:
            cls_attention = self.crossattention.self.cls_attention(hidden_states, encoder_hidden_states, encoder_index)
        hidden_states = self.crossattention(
            hidden_states, encoder_hidden_states, encoder_attention_mask, cache, encoder_index, **kwargs
        )
        hidden_states = self.output(self.intermediate(hidden_states), hidden_states)
        return hidden_states if cls_attention is None else (hidden_states, cls_attention)


class TripsConnectedLayer(TripsTextLayer):
    """
    BERT's layer over text and image tokens joined, as in mPLUG: it changes the image tokens too, which skipped the
    layers before it. What it makes of them is added to what they were.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        joint_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        joint_states = torch.cat((hidden_states, encoder_hidden_states), dim=1)
        joint_states = super().forward(joint_states, joint_attention_mask, **kwargs)
        text_states, image_states = joint_states.split((hidden_states.shape[1], encoder_hidden_states.shape[1]), dim=1)
        return text_states, encoder_hidden_states + image_states
