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
The text side: text encoder, fusion encoder and decoder, with BERT's parameter names.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithCrossAttentions,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    Seq2SeqLMOutput,
)
from transformers.models.bert.modeling_bert import (
    BertIntermediate,
    BertOutput,
    BertPredictionHeadTransform,
    BertSelfOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_trips import TripsDecoderConfig, TripsFusionConfig, TripsTextConfig
from .modeling_trips_vision import (
    TripsAttention,
    TripsPreTrainedModel,
    bidirectional_mask,
    class_states,
    first_positions,
    joint_padding_mask,
    select_rows,
)


# Name of the keys and values in `generate` and in outputs: "cache" since Transformers 5.24.
CACHE_NAME = "cache" if "cache" in Seq2SeqLMOutput.__dataclass_fields__ else "past_key_values"
# Decorator of `forward` for the former name. It warns up to a release: only where `generate` uses the new one.
accept_former_cache_name = deprecate_kwarg(
    "past_key_values", version="5.40.0" if CACHE_NAME == "cache" else "5.20.0", new_name="cache"
)


def check_text_length(length: int, max_length: int):
    if length > max_length:
        raise ValueError(f"The text has {length} tokens, `max_position_embeddings` allows {max_length}.")


# Layers


class TripsTextEmbeddings(nn.Module):
    """Word, position and token type embeddings, with BERT's parameter names."""

    def __init__(self, config: TripsTextConfig):
        super().__init__()
        hidden_size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache_length: int | torch.Tensor = 0,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        `cache_length` is the number of tokens in the decoder's cache, before the first one given. With
        `attention_mask`, positions are counted from each text's first token.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Specify exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        batch_size, seq_length, _ = inputs_embeds.shape
        length = seq_length
        if isinstance(cache_length, int):  # that of a static cache is on the device
            length = length + cache_length
        check_text_length(length, self.position_embeddings.num_embeddings)
        position_ids = torch.arange(seq_length, device=inputs_embeds.device) + cache_length
        if attention_mask is not None:
            starts = first_positions(attention_mask).to(position_ids.device)
            position_ids = (position_ids - starts[:, None]).clamp(min=0)  # (batch_size, seq_length)
        if token_type_ids is None:
            token_type_ids = torch.zeros((batch_size, seq_length), dtype=torch.long, device=inputs_embeds.device)
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids)
        embeddings = embeddings + self.position_embeddings(position_ids)
        embeddings = self.LayerNorm(embeddings)
        return self.dropout(embeddings)


class TripsTextSelfAttention(TripsAttention):
    """BERT's attention over the text itself, causal in the decoder."""

    is_cross_attention = False

    def __init__(self, config: TripsTextConfig, layer_idx: int, source_size: int | None = None):
        super().__init__(config)
        self.layer_idx = layer_idx
        source_size = source_size or config.hidden_size  # of the states that give keys and values
        self.is_causal = config.is_decoder

        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source_size, config.hidden_size)
        self.value = nn.Linear(source_size, config.hidden_size)

    def key_value(self, hidden_states: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, torch.Tensor]:
        key = self.split_heads(self.key(hidden_states))
        value = self.split_heads(self.value(hidden_states))
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        return key, value

    def forward(
        self,
        hidden_states: torch.Tensor,
        source_states: torch.Tensor,
        attention_mask: Any = None,
        source_index: torch.LongTensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`source_states` give keys and values, to row i those of `source_index[i]`, by default i."""
        query = self.split_heads(self.query(hidden_states))
        key, value = self.key_value(source_states, cache)
        key = select_rows(key, source_index)  # (batch_size, num_heads, num_keys, head_dim)
        value = select_rows(value, source_index)
        implementation = None
        # Flash attention would also drop queries by its mask, which is of shape (batch_size, key_length).
        if self.is_cross_attention and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None].bool()  # (batch_size, 1, 1, key_length)
            implementation = "sdpa"
        return self.attend(query, key, value, attention_mask, implementation=implementation, **kwargs)


class TripsTextCrossAttention(TripsTextSelfAttention):
    """Attention of the text to other states, whose keys and values are cached."""

    is_cross_attention = True

    def __init__(self, config: TripsFusionConfig | TripsDecoderConfig, layer_idx: int):
        super().__init__(config, layer_idx, config.cross_attention_hidden_size)
        self.is_causal = False

    def key_value(self, hidden_states: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, torch.Tensor]:
        if cache is None:
            return super().key_value(hidden_states, None)
        if cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        cache.is_updated[self.layer_idx] = True
        return super().key_value(hidden_states, cache.cross_attention_cache)


class TripsTextAttention(nn.Module):
    def __init__(self, config: TripsTextConfig, layer_idx: int, attention_class: type[nn.Module]):
        super().__init__()
        self.self = attention_class(config, layer_idx)
        self.output = BertSelfOutput(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        source_states: torch.Tensor,
        attention_mask: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self(hidden_states, source_states, attention_mask, **kwargs)
        return self.output(attn_output, hidden_states)


class TripsTextLayer(GradientCheckpointingLayer):
    """BERT's post-norm layer."""

    def __init__(self, config: TripsTextConfig, layer_idx: int):
        super().__init__()
        self.attention = TripsTextAttention(config, layer_idx, TripsTextSelfAttention)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        hidden_states = self.attention(hidden_states, hidden_states, attention_mask, **kwargs)
        intermediate_states = self.intermediate(hidden_states)
        return self.output(intermediate_states, hidden_states)


class TripsCrossLayer(TripsTextLayer):
    """BERT's layer with cross-attention between self-attention and feed-forward, as in ALBEF's upper layers."""

    def __init__(self, config: TripsFusionConfig | TripsDecoderConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.crossattention = TripsTextAttention(config, layer_idx, TripsTextCrossAttention)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: Any = None,
        encoder_attention_mask: Any = None,
        encoder_index: torch.LongTensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Text i reads row `encoder_index[i]` of `encoder_hidden_states`, by default row i."""
        hidden_states = self.attention(hidden_states, hidden_states, attention_mask, cache=cache, **kwargs)
        hidden_states = self.crossattention(
            hidden_states,
            encoder_hidden_states,
            encoder_attention_mask,
            source_index=encoder_index,
            cache=cache,
            **kwargs,
        )
        return self.output(self.intermediate(hidden_states), hidden_states)


class TripsConnectedLayer(TripsTextLayer):
    """
    BERT's layer over text and image tokens joined, as in mPLUG. It also changes the image tokens, which skipped the
    layers before: its output is added to them.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        joint_mask: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`joint_mask` is that of all tokens."""
        text_length = hidden_states.shape[1]
        num_image_tokens = encoder_hidden_states.shape[1]
        joint_states = torch.cat((hidden_states, encoder_hidden_states), dim=1)
        joint_states = super().forward(joint_states, joint_mask, **kwargs)
        text_states, image_states = joint_states.split((text_length, num_image_tokens), dim=1)
        return text_states, encoder_hidden_states + image_states


# Outputs that `output_hidden_states` and `output_attentions` ask for.
CROSS_OUTPUTS = {
    "hidden_states": TripsTextLayer,
    "attentions": OutputRecorder(TripsTextSelfAttention, index=1, layer_name="attention"),
    "cross_attentions": OutputRecorder(TripsTextCrossAttention, index=1, layer_name="crossattention"),
}


class TripsLMHead(BertPredictionHeadTransform):
    """BERT's prediction head: hidden states -> logits over the vocabulary."""

    def __init__(self, config: TripsDecoderConfig):
        super().__init__(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(super().forward(hidden_states))


@auto_docstring(
    custom_intro="""
    The layers of BERT that see only the text. The output of its first token, [CLS], or the mean of all
    (`pooling_mode`) guides the patch selection.
    """
)
class TripsTextModel(TripsPreTrainedModel):
    config: TripsTextConfig
    input_modalities = ("text",)
    auto_classes = ("AutoModel",)
    _input_embed_layer = "word_embeddings"
    _can_record_outputs = {"hidden_states": TripsTextLayer, "attentions": TripsTextSelfAttention}

    def __init__(self, config: TripsTextConfig):
        super().__init__(config)
        self.embeddings = TripsTextEmbeddings(config)
        layers = nn.ModuleList(TripsTextLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})  # BERT's names
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        hidden_states = self.embeddings(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
        )
        mask = bidirectional_mask(self.config, attention_mask, inputs_embeds=hidden_states)
        for layer in self.encoder["layer"]:
            hidden_states = layer(hidden_states, attention_mask=mask, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.pooled(hidden_states, attention_mask)
        )

    def pooled(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Return the text guidance t, `(num_texts, hidden_size)`, from the states of all tokens, `(num_texts,
        text_length, hidden_size)`, without padding.
        """
        # CODEPATH: BERT represents a text by [CLS], sentence encoders by the mean of its tokens.
        if self.config.pooling_mode == "cls":
            return class_states(hidden_states, attention_mask)
        if attention_mask is None:
            return hidden_states.mean(dim=1)
        weights = attention_mask.to(hidden_states.dtype)[:, :, None]  # (num_texts, text_length, 1)
        return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


@auto_docstring(
    custom_intro="""
    The upper layers of BERT with cross-attention to the remaining image tokens (ALBEF's multimodal encoder), or
    mPLUG's skip-connected network. There, `attentions` of a connected layer are those of text and image tokens
    together, in this order; `cross_attentions` are those of the other layers, `hidden_states` those of the text.
    """
)
class TripsFusionModel(TripsPreTrainedModel):
    config: TripsFusionConfig
    main_input_name = "inputs_embeds"
    _can_record_outputs = CROSS_OUTPUTS

    def __init__(self, config: TripsFusionConfig):
        super().__init__(config)
        config.validate()  # fields may have been set since the configuration was made
        self.image_projection = None
        layers = nn.ModuleList()
        for layer_idx in range(config.num_hidden_layers):
            # CODEPATH: ALBEF's layers read the image tokens as they are; some of mPLUG's also change them.
            is_connected = layer_idx + 1 in config.connected_layers
            layer_class = TripsConnectedLayer if is_connected else TripsCrossLayer
            layers.append(layer_class(config, layer_idx))
        self.encoder = nn.ModuleDict({"layer": layers})  # BERT's names
        # CODEPATH: tokens that are joined must be equally wide.
        if config.connected_layers and config.encoder_hidden_size not in (None, config.hidden_size):
            self.image_projection = nn.Linear(config.encoder_hidden_size, config.hidden_size)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        inputs_embeds: torch.FloatTensor,
        encoder_hidden_states: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithCrossAttentions:
        r"""
        image_index (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
            Text i reads row `image_index[i]` of `encoder_hidden_states`, so that image tokens which several texts
            have in common are projected to keys and values once. By default row i.
        """
        text_mask = bidirectional_mask(self.config, attention_mask, inputs_embeds=inputs_embeds)
        hidden_states = inputs_embeds
        joint_mask = None
        if self.image_projection is not None:
            encoder_hidden_states = self.image_projection(encoder_hidden_states)
        # CODEPATH: only mPLUG's fusion joins text and image tokens.
        if self.config.connected_layers:
            num_image_tokens = encoder_hidden_states.shape[1]
            num_tokens = inputs_embeds.shape[1] + num_image_tokens
            joint_mask = bidirectional_mask(
                self.config,
                joint_padding_mask(attention_mask, num_image_tokens),
                inputs_embeds=inputs_embeds[:, :1].expand(-1, num_tokens, -1),  # only its shape is used
            )
        for layer in self.encoder["layer"]:
            if isinstance(layer, TripsConnectedLayer):
                # From here on, each text has image tokens of its own.
                encoder_hidden_states = select_rows(encoder_hidden_states, image_index)
                image_index = None
                hidden_states, encoder_hidden_states = layer(
                    hidden_states, encoder_hidden_states, joint_mask=joint_mask, **kwargs
                )
            else:
                hidden_states = layer(
                    hidden_states,
                    encoder_hidden_states,
                    attention_mask=text_mask,
                    encoder_index=image_index,
                    **kwargs,
                )
        return BaseModelOutputWithCrossAttentions(last_hidden_state=hidden_states)


@auto_docstring(
    custom_intro="Causal BERT layers with cross-attention to the fused states: writes answers and captions."
)
class TripsDecoder(TripsPreTrainedModel):
    config: TripsDecoderConfig
    _input_embed_layer = "word_embeddings"
    _can_record_outputs = CROSS_OUTPUTS

    def __init__(self, config: TripsDecoderConfig):
        super().__init__(config)
        self.embeddings = TripsTextEmbeddings(config)
        layers = nn.ModuleList(TripsCrossLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    @accept_former_cache_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        r"""
        cache (`Cache`, *optional*):
            Keys and values of the tokens before `input_ids`.
        """
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        cache_length = cache.get_seq_length() if cache is not None else 0
        hidden_states = self.embeddings(input_ids=input_ids, inputs_embeds=inputs_embeds, cache_length=cache_length)
        attention_mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask, **{CACHE_NAME: cache}
        )
        if encoder_attention_mask is not None:
            encoder_attention_mask = bidirectional_mask(
                self.config,
                encoder_attention_mask,
                inputs_embeds=hidden_states,
                encoder_hidden_states=encoder_hidden_states,
            )
        for layer in self.encoder["layer"]:
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                attention_mask=attention_mask,
                encoder_attention_mask=encoder_attention_mask,
                cache=cache,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states, **{CACHE_NAME: cache})


TripsTextModel.register_for_auto_class("AutoModel")
# The text encoder loads from the checkpoint of a whole model, too.
register_checkpoint_conversion_mapping(
    "TripsTextModel",
    [PrefixChange(prefix_to_remove="model"), PrefixChange(prefix_to_remove="text_model")],
    overwrite=True,
)

__all__ = ["TripsDecoder", "TripsFusionModel", "TripsTextModel"]
