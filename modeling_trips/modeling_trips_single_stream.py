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
"""The single stream of TRIPS: ViLT's transformer over text and patches, in which the text picks the patches."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_trips import TripsVisionConfig
from .modeling_trips_layers import bidirectional_mask, check_counts, check_image_source, joint_padding_mask
from .modeling_trips_vision import (
    TripsSelection,
    TripsVisionModel,
    TripsVisionModelOutput,
    TripsVisionPrefix,
    next_candidates,
    selection_of,
    with_class_token,
)
from .modeling_trips_vision_layers import TripsJointLayer


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

    def encode_prefix(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> TripsVisionPrefix:
        """
        All that does not depend on the text: the embeddings, no layer, as the text takes part in the first one.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`): as in
                [`TripsVisionModel.encode_prefix`].

        Returns:
            [`TripsVisionPrefix`], for `forward`.
        """
        return TripsVisionPrefix(self.embeddings(pixel_values), grid_size=self.embeddings.grid_of(pixel_values))

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
        options, candidate_mask = self.config.selection_options, None
        for number, layer in enumerate(self.layers, start=1):
            hidden_states, scores, kept_positions, new_mask = layer(
                hidden_states,
                text_length,
                mask,
                candidate_mask=candidate_mask,
                **options.get(number, {}),
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
        prefix: TripsVisionPrefix | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsSingleStreamModelOutput:
        r"""
        text_states (`torch.FloatTensor` of shape `(num_texts, text_length, hidden_size)`):
            Embeddings of the texts. The first token, [CLS], guides: pad texts on the right.
        attention_mask (`torch.Tensor` of shape `(num_texts, text_length)`, *optional*):
            0 marks padding of the texts.
        image_index (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
            Text i is joined with image `image_index[i]`. By default text i with image i.
        prefix (`TripsVisionPrefix`, *optional*):
            Result of `encode_prefix`, in place of `pixel_values`.
        """
        check_image_source(pixel_values, prefix)
        image_states = (self.encode_prefix(pixel_values, **kwargs) if prefix is None else prefix).hidden_states
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

__all__ = ["TripsSingleStreamModel", "TripsSingleStreamModelOutput"]
