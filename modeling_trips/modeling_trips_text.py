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
"""The language side of TRIPS: text encoder, fusion encoder and decoder, with BERT's parameter names."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithCrossAttentions,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_trips import TripsDecoderConfig, TripsFusionConfig, TripsTextConfig
from .modeling_trips_layers import TripsPreTrainedModel, bidirectional_mask, joint_padding_mask
from .modeling_trips_text_layers import (
    TripsConnectedLayer,
    TripsCrossLayer,
    TripsTextCrossAttention,
    TripsTextEmbeddings,
    TripsTextLayer,
    TripsTextSelfAttention,
)
from .versions_trips import CACHE_NAME, accept_former_cache_name


class TripsLayerStack(nn.Module):
    """Layers under the name `layer`, as in BERT's encoder."""

    def __init__(self, config: TripsTextConfig, layer_class: type[nn.Module]):
        super().__init__()
        self.layer = nn.ModuleList(layer_class(config, layer_idx) for layer_idx in range(config.num_hidden_layers))

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args,
        output_cls_attention: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`output_cls_attention`: whether the last layer, a [`TripsCrossLayer`], also tells where [CLS] looks."""
        for number, layer in enumerate(self.layer, start=1):
            if output_cls_attention and number == len(self.layer):
                return layer(hidden_states, *args, output_cls_attention=True, **kwargs)
            hidden_states = layer(hidden_states, *args, **kwargs)
        return hidden_states


class TripsSkipConnectedStack(nn.Module):
    """
    mPLUG's fusion: layers that change the text alone, which the image tokens skip, and now and then one that both go
    through together.
    """

    def __init__(self, config: TripsFusionConfig):
        super().__init__()
        layer_classes = [TripsCrossLayer] * config.num_hidden_layers
        for number in config.connected_layers:
            layer_classes[number - 1] = TripsConnectedLayer
        self.last_cross_layer = max(set(range(1, config.num_hidden_layers + 1)) - set(config.connected_layers))
        self.layer = nn.ModuleList(
            layer_class(config, layer_idx) for layer_idx, layer_class in enumerate(layer_classes)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        joint_attention_mask: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_index: torch.LongTensor | None = None,
        output_cls_attention: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`output_cls_attention`: whether the last layer with cross-attention also tells where [CLS] looks."""
        cls_attention = None
        for number, layer in enumerate(self.layer, start=1):
            if isinstance(layer, TripsConnectedLayer):
                if encoder_index is not None:  # from here on, each text has image tokens of its own
                    encoder_hidden_states = encoder_hidden_states.index_select(
                        0, encoder_index.to(encoder_hidden_states.device)
                    )
                    encoder_index = None
                hidden_states, encoder_hidden_states = layer(
                    hidden_states, encoder_hidden_states, joint_attention_mask, **kwargs
                )
            else:
                is_asked = output_cls_attention and number == self.last_cross_layer
                hidden_states = layer(
                    hidden_states,
                    encoder_hidden_states,
                    attention_mask,
                    encoder_attention_mask,
                    encoder_index=encoder_index,
                    output_cls_attention=is_asked,
                    **kwargs,
                )
                if is_asked:
                    hidden_states, cls_attention = hidden_states
        return (hidden_states, cls_attention) if output_cls_attention else hidden_states


class TripsLMHead(nn.Module):
    """BERT's prediction head: hidden states -> logits over the vocabulary."""

    def __init__(self, config: TripsDecoderConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.LayerNorm(self.activation_fn(self.dense(hidden_states))))


@auto_docstring(
    custom_intro="""
    The layers of BERT that see only the text. The output of its first token, [CLS], guides the patch selection, or the
    mean of all (`pooling_mode`): pad texts on the right.
    """
)
class TripsTextModel(TripsPreTrainedModel):
    config: TripsTextConfig
    input_modalities = ("text",)
    _can_record_outputs = {"hidden_states": TripsTextLayer, "attentions": TripsTextSelfAttention}

    def __init__(self, config: TripsTextConfig):
        super().__init__(config)
        self.embeddings = TripsTextEmbeddings(config)
        self.encoder = TripsLayerStack(config, TripsTextLayer)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

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
        hidden_states = self.embeddings(input_ids, token_type_ids, inputs_embeds)
        extended_mask = bidirectional_mask(self.config, attention_mask, inputs_embeds=hidden_states)
        hidden_states = self.encoder(hidden_states, extended_mask, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.pooled(hidden_states, attention_mask)
        )

    def pooled(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        The text guidance t, `(num_texts, hidden_size)`, of the states of all tokens, `(num_texts, text_length,
        hidden_size)`. Padding, where `attention_mask` is 0, does not count.
        """
        # CODEPATH: BERT gathers a text in [CLS], sentence encoders in the mean of its tokens.
        if self.config.pooling_mode == "cls":
            return hidden_states[:, 0]
        if attention_mask is None:
            return hidden_states.mean(dim=1)
        counts = attention_mask.to(hidden_states.dtype)[:, :, None]
        return (hidden_states * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)


@auto_docstring(custom_intro="Output of [`TripsFusionModel`].")
@dataclass
class TripsFusionModelOutput(BaseModelOutputWithCrossAttentions):
    r"""
    cls_attention (`torch.FloatTensor` of shape `(num_texts, num_heads, num_image_tokens)`, *optional*):
        With `output_cls_attention=True`: how much the text's [CLS] attends to each image token in the last layer with
        cross-attention, float32, whatever the attention implementation. Padding has a part in it.
    """

    cls_attention: torch.FloatTensor | None = None


@auto_docstring(
    custom_intro="""
    The upper layers of BERT with cross-attention to the image tokens that patch selection left (ALBEF's multimodal
    encoder), or mPLUG's skip-connected network. There, `attentions` of a connected layer are those of text and image
    tokens together, in this order; `cross_attentions` are those of the other layers, `hidden_states` the text's.
    """
)
class TripsFusionModel(TripsPreTrainedModel):
    config: TripsFusionConfig
    main_input_name = "inputs_embeds"
    _can_record_outputs = {
        "hidden_states": TripsTextLayer,
        "attentions": OutputRecorder(TripsTextSelfAttention, index=1, layer_name="attention"),
        "cross_attentions": OutputRecorder(TripsTextCrossAttention, index=1, layer_name="crossattention"),
    }

    def __init__(self, config: TripsFusionConfig):
        super().__init__(config)
        config.validate()  # fields may have been set since the configuration was made
        self.image_projection = None
        # CODEPATH: ALBEF's layers read the image tokens as they are; mPLUG's also change them.
        if config.fusion_type == "skip_connected":
            self.encoder = TripsSkipConnectedStack(config)
            # CODEPATH: what is joined must be equally wide.
            if config.encoder_hidden_size not in (None, config.hidden_size):
                self.image_projection = nn.Linear(config.encoder_hidden_size, config.hidden_size)
        else:
            self.encoder = TripsLayerStack(config, TripsCrossLayer)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        inputs_embeds: torch.FloatTensor,
        encoder_hidden_states: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        encoder_index: torch.LongTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        output_cls_attention: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsFusionModelOutput:
        r"""
        encoder_index (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
            Text i reads row `encoder_index[i]` of `encoder_hidden_states`, so that image tokens which several texts
            have in common are projected to keys and values once. By default row i.
        encoder_attention_mask (`torch.Tensor` of shape `(num_rows, num_image_tokens)`, *optional*):
            0 marks padding of `encoder_hidden_states`.
        output_cls_attention (`bool`, *optional*, defaults to `False`):
            Whether to return `cls_attention`.
        """
        masks, image_mask = [bidirectional_mask(self.config, attention_mask, inputs_embeds=inputs_embeds)], None
        num_image_tokens, one_token = encoder_hidden_states.shape[1], inputs_embeds[:, :1]  # looked at for its shape
        if encoder_attention_mask is not None:
            if encoder_index is not None:
                index = encoder_index.to(encoder_attention_mask.device)
                encoder_attention_mask = encoder_attention_mask.index_select(0, index)
            image_mask = bidirectional_mask(
                self.config,
                encoder_attention_mask,
                inputs_embeds=inputs_embeds,
                encoder_hidden_states=one_token.expand(-1, num_image_tokens, -1),
            )
        if self.image_projection is not None:
            encoder_hidden_states = self.image_projection(encoder_hidden_states)
        # CODEPATH: as in `__init__`.
        if self.config.fusion_type == "skip_connected":
            text_length = inputs_embeds.shape[1]
            joint_mask = bidirectional_mask(
                self.config,
                joint_padding_mask((attention_mask, text_length), (encoder_attention_mask, num_image_tokens)),
                inputs_embeds=one_token.expand(-1, text_length + num_image_tokens, -1),
            )
            masks.append(joint_mask)
        fused = self.encoder(
            inputs_embeds,
            encoder_hidden_states,
            *masks,
            encoder_attention_mask=image_mask,
            encoder_index=encoder_index,
            output_cls_attention=output_cls_attention,
            **kwargs,
        )
        hidden_states, cls_attention = fused if output_cls_attention else (fused, None)
        return TripsFusionModelOutput(last_hidden_state=hidden_states, cls_attention=cls_attention)


@auto_docstring(
    custom_intro="Causal BERT layers with cross-attention to the fused states: writes answers and captions."
)
class TripsDecoder(TripsPreTrainedModel):
    config: TripsDecoderConfig
    _can_record_outputs = {
        "hidden_states": TripsCrossLayer,
        "attentions": OutputRecorder(TripsTextSelfAttention, index=1, layer_name="attention"),
        "cross_attentions": OutputRecorder(TripsTextCrossAttention, index=1, layer_name="crossattention"),
    }

    def __init__(self, config: TripsDecoderConfig):
        super().__init__(config)
        self.embeddings = TripsTextEmbeddings(config)
        self.encoder = TripsLayerStack(config, TripsCrossLayer)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

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
        hidden_states = self.embeddings(input_ids, inputs_embeds=inputs_embeds, cache_length=cache_length)
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
        hidden_states = self.encoder(
            hidden_states, encoder_hidden_states, attention_mask, encoder_attention_mask, cache=cache, **kwargs
        )
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states, **{CACHE_NAME: cache})


TripsTextModel.register_for_auto_class("AutoModel")
# The text encoder loads from the checkpoint of a whole model, too.
register_checkpoint_conversion_mapping(
    "TripsTextModel",
    [PrefixChange(prefix_to_remove="model"), PrefixChange(prefix_to_remove="text_model")],
    overwrite=True,
)

__all__ = ["TripsDecoder", "TripsFusionModel", "TripsLMHead", "TripsTextModel"]
