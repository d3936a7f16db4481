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
"""TRIPS as a Transformers model: text encoder, text-guided vision tower and fusion encoder under one name."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, can_return_tuple

from .configuration_trips import TripsConfig
from .losses_trips import region_targets, selection_loss
from .modeling_trips_layers import TripsPreTrainedModel
from .modeling_trips_single_stream import TripsSingleStreamModel
from .modeling_trips_text import TripsFusionModel, TripsTextModel
from .modeling_trips_vision import (
    TripsSelection,
    TripsVisionModel,
    TripsVisionModelOutput,
    TripsVisionPrefix,
    repeated,
)


@auto_docstring(custom_intro="Output of [`TripsModel`].")
@dataclass
class TripsModelOutput(ModelOutput):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(num_texts, text_length, hidden_size)`):
        The fused states: the text's tokens after they attended to the image tokens.
    selection (`tuple(TripsSelection)`):
        What each selection layer kept, in the order of the layers.
    hidden_states, attentions, cross_attentions (`tuple(torch.FloatTensor)`, *optional*):
        Of the fusion encoder; of the whole sequence in a single stream, which has no `cross_attentions`.
    cls_attention (`torch.FloatTensor` of shape `(num_texts, num_heads, num_image_tokens)`, *optional*):
        With `output_cls_attention=True`: how much the text's [CLS] attends to each image token in the last layer with
        cross-attention, float32, whatever the attention implementation. Padding has a part in it.
    selection_losses (`torch.FloatTensor` of shape `(num_texts,)`, *optional*):
        How far each text's choice of patches is from its region; 0 without one. In training, if regions are given.
    text_model_output (`BaseModelOutputWithPooling`):
        Output of the text encoder. Its `pooler_output` is the text guidance t (but in a single stream).
    vision_model_output (`TripsVisionModelOutput`):
        Output of the vision tower: the image tokens that selection left.
    """

    last_hidden_state: torch.FloatTensor | None = None
    selection: tuple[TripsSelection, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    cls_attention: torch.FloatTensor | None = None
    selection_losses: torch.FloatTensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: TripsVisionModelOutput | None = None


@auto_docstring(
    custom_intro="""
    The bare TRIPS model. The text goes first, since it picks the patches: text encoder -> vision tower under the
    text's guidance -> fusion encoder. Nothing goes back. `config.fusion_type` gives it the form of ALBEF, of mPLUG, or
    of ViLT: text embeddings -> vision tower, through which text and patches go together.
    """
)
class TripsModel(TripsPreTrainedModel):
    def __init__(self, config: TripsConfig):
        super().__init__(config)
        config.validate()  # fields may have been set since the configuration was made
        self.text_model = TripsTextModel(config.text_config)
        # CODEPATH: ALBEF and mPLUG have two towers and a fusion encoder, ViLT a single stream.
        if config.fusion_type == "single_stream":
            self.vision_model = TripsSingleStreamModel(config.vision_config)
            self.fusion_model = None
        else:
            self.vision_model = TripsVisionModel(config.vision_config)
            self.fusion_model = TripsFusionModel(config.fusion_encoder_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.text_model.set_input_embeddings(value)

    def encode_images(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> TripsVisionPrefix:
        """
        The text-independent part of the vision tower, computed once per image: see [`TripsVisionModel.encode_prefix`].

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`)

        Returns:
            [`TripsVisionPrefix`], the `prefix` of `forward`.
        """
        return self.vision_model.encode_prefix(pixel_values, **kwargs)

    def fuse(
        self,
        text_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_index: torch.LongTensor | None = None,
        prefix: TripsVisionPrefix | None = None,
        regions: torch.FloatTensor | None = None,
        patch_targets: torch.FloatTensor | None = None,
        output_cls_attention: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsModelOutput:
        """
        All that comes behind the text encoder, for texts that are encoded already, one row per pair of text and image.

        Args:
            text_states (`torch.Tensor` of shape `(num_pairs, text_length, hidden_size)`): the `last_hidden_state` of
                `text_model`. A text that is to meet several images is repeated.
            attention_mask, pixel_values, image_index, prefix, regions, patch_targets, output_cls_attention: as in
                `forward`.

        Returns:
            [`TripsModelOutput`] without `text_model_output`.

        Raises:
            `ValueError`: if `output_cls_attention` is asked of a single stream.
        """
        images = {"pixel_values": pixel_values, "image_index": image_index, "prefix": prefix}
        # CODEPATH: as in `__init__`.
        if self.fusion_model is None:
            if output_cls_attention:
                raise ValueError(
                    "A single stream has no cross-attention: leave out `output_cls_attention`, and set "
                    "`pointing_loss_coefficient` to 0."
                )
            joint = self.vision_model(text_states, attention_mask=attention_mask, **images, **kwargs)
            return TripsModelOutput(
                last_hidden_state=joint.text_states,
                selection=joint.selection,
                hidden_states=joint.hidden_states,
                attentions=joint.attentions,
                selection_losses=self.selection_losses(joint.selection, regions, patch_targets, pixel_values, prefix),
                vision_model_output=joint,
            )
        # What no text has touched is projected to keys and values once per image.
        text_embeds = self.text_model.pooled(text_states, attention_mask)
        vision_output = self.vision_model(text_embeds=text_embeds, repeat_images=False, **images, **kwargs)
        fused = self.fusion_model(
            text_states,
            vision_output.last_hidden_state,
            attention_mask,
            vision_output.image_index,
            vision_output.attention_mask,
            output_cls_attention,
            **kwargs,
        )
        vision_output = repeated(vision_output)
        return TripsModelOutput(
            last_hidden_state=fused.last_hidden_state,
            selection=vision_output.selection,
            hidden_states=fused.hidden_states,
            attentions=fused.attentions,
            cross_attentions=fused.cross_attentions,
            cls_attention=fused.cls_attention,
            selection_losses=self.selection_losses(
                vision_output.selection, regions, patch_targets, pixel_values, prefix
            ),
            vision_model_output=vision_output,
        )

    def grid_of(self, pixel_values: torch.Tensor | None, prefix: TripsVisionPrefix | None) -> tuple[int, int]:
        """Patches of each image, down and across."""
        return prefix.grid_size if pixel_values is None else self.vision_model.embeddings.grid_of(pixel_values)

    def selection_losses(
        self,
        selection: tuple[TripsSelection, ...],
        regions: torch.FloatTensor | None,
        patch_targets: torch.FloatTensor | None,
        pixel_values: torch.Tensor | None,
        prefix: TripsVisionPrefix | None,
    ) -> torch.Tensor | None:
        """The mean over the layers that a text guides, `(num_texts,)`; `None` where there is nothing to teach."""
        guidances = self.vision_model.config.guidance_schedule
        by_text = [layer for layer, guidance in zip(selection, guidances.values()) if guidance == "text"]
        is_taught = self.training and self.config.selection_loss_weight > 0
        # CODEPATH: a weight of 0 turns the loss off; in evaluation, nothing is taught.
        if not (is_taught and by_text) or (regions is None and patch_targets is None):
            return None
        if regions is not None:
            of_regions = region_targets(regions, self.grid_of(pixel_values, prefix))
            has_none = of_regions.sum(dim=-1, keepdim=True) == 0
            patch_targets = of_regions if patch_targets is None else patch_targets.where(has_none, of_regions)
        losses = [selection_loss(layer.scores, layer.candidate_indices, patch_targets) for layer in by_text]
        return torch.stack(losses).mean(dim=0)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        prefix: TripsVisionPrefix | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        regions: torch.FloatTensor | None = None,
        patch_targets: torch.FloatTensor | None = None,
        output_cls_attention: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsModelOutput:
        r"""
        image_index (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
            Text i looks at image `image_index[i]`. By default text i looks at image i.
        prefix (`TripsVisionPrefix`, *optional*):
            Result of `encode_images`, in place of `pixel_values`.
        regions (`torch.FloatTensor` of shape `(num_texts, 4)`, *optional*):
            What each text is about: boxes (center_x, center_y, width, height) in [0, 1] of the image in
            `pixel_values`, as [`TripsProcessor.encode_boxes`] makes them; one of no area where it is not known. In
            training they teach the texts to choose their patches, see `selection_loss_weight`.
        patch_targets (`torch.FloatTensor` of shape `(num_texts, num_patches)`, *optional*):
            Where a teacher looks for each text, patches in row-major order: each row sums to 1. They teach those texts
            whose region is not known.
        output_cls_attention (`bool`, *optional*, defaults to `False`):
            Whether to return `cls_attention`. A single stream has none.
        """
        text_output = self.text_model(input_ids, attention_mask, token_type_ids, inputs_embeds, **kwargs)
        outputs = self.fuse(
            text_output.last_hidden_state,
            attention_mask,
            pixel_values,
            image_index,
            prefix,
            regions,
            patch_targets,
            output_cls_attention,
            **kwargs,
        )
        outputs.text_model_output = text_output
        return outputs


TripsModel.register_for_auto_class("AutoModel")

__all__ = ["TripsModel", "TripsModelOutput", "TripsPreTrainedModel"]
