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
"""Layers of TRIPS: a pre-norm vision layer that can select patches, and the post-norm text layer of BERT."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring

from .configuration_trips import TripsConfig, TripsDecoderConfig, TripsFusionConfig, TripsTextConfig, TripsVisionConfig
from .patch_selection import random_scores, score_tokens, select_tokens


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()
    return attn_output, attn_weights


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

    def score(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Scores of the candidates, whose keys are `key`, by the guiding token's `query`; or random ones."""
        # CODEPATH: "random" is the floor that every way of selecting must beat.
        if self.config.selection_guidance == "random":
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
            # CODEPATH: without a text, and in the ablation "image", the image's own [CLS] guides.
            if self.config.selection_guidance == "text" and text_embeds is not None:
                query = self.attention.q_proj(text_embeds).view(class_query.shape)
            scores = self.score(query, key[:, :, 1:])
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, text_length + 1 + num_candidates, hidden_size)`)
            text_length (`int`): number of text tokens, padding included.
            attention_mask (`torch.Tensor`, *optional*): hides the padding, in the form of the attention in use.
            keep_rate (`float`, *optional*, defaults to 1.0): share of the candidates that goes on.

        Returns:
            `(hidden_states, scores, kept_positions)`, the last two `None` if nothing is selected.
        """
        hidden_states, query, key = self.attend(hidden_states, attention_mask, **kwargs)
        scores = None
        if keep_rate < 1.0:
            # CODEPATH: the text's [CLS] guides; in the ablation "image" it is the image's, behind the text.
            guide = 0 if self.config.selection_guidance == "text" else text_length
            scores = self.score(query[:, :, guide], key[:, :, text_length + 1 :])
        return self.select_and_transform(hidden_states, scores, keep_rate)


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
        max_length = self.position_embeddings.num_embeddings
        if length > max_length:
            raise ValueError(f"The text has {length} tokens, `max_position_embeddings` allows {max_length}.")


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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self.split_heads(self.query(hidden_states))
        key, value = self.key_value(source_states, cache)
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self(hidden_states, source_states, attention_mask, cache, **kwargs)
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        hidden_states = self.attention(hidden_states, hidden_states, attention_mask, cache, **kwargs)
        hidden_states = self.crossattention(
            hidden_states, encoder_hidden_states, encoder_attention_mask, cache, **kwargs
        )
        return self.output(self.intermediate(hidden_states), hidden_states)


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


def bidirectional_mask(config: PreTrainedConfig, attention_mask: torch.Tensor | None, **kwargs):
    """
    Transformers' `create_bidirectional_mask`, but where there is a mask of padding it is used: looking whether it
    hides anything would sync with the host.
    """
    return create_bidirectional_mask(
        config=config, attention_mask=attention_mask, allow_is_bidirectional_skip=attention_mask is None, **kwargs
    )


def joint_padding_mask(attention_mask: torch.Tensor | None, num_image_tokens: int) -> torch.Tensor | None:
    """Of a sequence of text and image tokens: the text's mask, and ones, as there is no padding among the latter."""
    if attention_mask is None:
        return None
    # Of `len(attention_mask)`, an exported program would make a constant.
    return torch.cat((attention_mask, attention_mask.new_ones(attention_mask.shape[0], num_image_tokens)), dim=1)


@auto_docstring
class TripsPreTrainedModel(PreTrainedModel):
    config: TripsConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "TripsVisionEmbeddings",
        "TripsTextEmbeddings",
        "TripsVisionLayer",
        "TripsTextLayer",
        "TripsCrossLayer",
        "TripsJointLayer",
        "TripsConnectedLayer",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | os.PathLike | PreTrainedModel,
        text: str | os.PathLike | PreTrainedModel,
        output_loading_info: bool = False,
        **options,
    ):
        """
        A model from a vision tower and a text encoder that were trained apart. What neither has is new, and logged.

        Args:
            vision (`str` or `PreTrainedModel`): a ViT, DeiT or CLIP model: its name on the Hub, its folder, or itself.
            text (`str` or `PreTrainedModel`): a BERT, MiniLM or RoBERTa, likewise.
            output_loading_info (`bool`, *optional*, defaults to `False`): whether to return a report, too.
            options: those of [`~conversion_parts_trips.load_vision_text`], such as `num_text_layers`,
                `num_fusion_layers` and `image_size`; and the fields of [`TripsConfig`], such as `keep_rate`.

        Returns:
            The model in evaluation mode, or `(model, ConversionReport)`.

        Raises:
            TypeError: if this class is a part of a model.
            ConversionError: if `vision` or `text` is of another kind, or its weights are not as expected.
        """
        from .conversion_parts_trips import load_vision_text  # not earlier: nothing else needs it

        if cls.config_class is not TripsConfig:
            raise TypeError(f"{cls.__name__} is a part of a model: load it with `from_pretrained`.")
        model, report = load_vision_text(cls, vision, text, **options)
        return (model, report) if output_loading_info else model

    def unused_parameters(self) -> list[nn.Parameter]:
        """
        Those that get no gradient with this configuration: freeze them where data parallel training is told not to
        look for unused parameters, or it waits for their gradients.
        """
        parts = [module for module in self.children() if isinstance(module, TripsPreTrainedModel)]
        return [parameter for part in parts for parameter in part.unused_parameters()]

    def save_pretrained(self, save_directory, **kwargs):
        """As in Transformers. The folder gets the code of every class, to load where this project is not."""
        from .registration_trips import describe_code  # not earlier: it imports every class, this one included

        describe_code(self)
        with _named_as_before_sharding(type(self)):
            # A part that was loaded from a whole model is saved under its own names.
            super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})


def class_before_sharding(cls: type) -> type:
    """FSDP makes a class of its own for a model that it shards: the one that this was made from; `cls` otherwise."""
    return next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))


@contextmanager
def _named_as_before_sharding(cls: type) -> Iterator[None]:
    """By name and module, Transformers finds the code to copy into a checkpoint, and names the class there."""
    original, names = class_before_sharding(cls), (cls.__module__, cls.__name__)
    cls.__module__, cls.__name__ = original.__module__, original.__name__
    try:
        yield
    finally:
        cls.__module__, cls.__name__ = names


__all__ = ["TripsPreTrainedModel", "class_before_sharding"]
