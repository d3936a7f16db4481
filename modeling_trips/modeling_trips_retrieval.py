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
"""TRIPS for retrieval: texts find images and images find texts, by features first and by matching the best again."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, can_return_tuple

from .configuration_trips import TripsConfig
from .losses_contrastive_trips import check_captions, contrastive_loss, matching_loss, matching_pairs, similarity
from .losses_trips import mean_count, weighted_sum
from .modeling_trips import TripsModel, TripsPreTrainedModel
from .modeling_trips_vision import TripsSelection, TripsVisionModelOutput, TripsVisionPrefix, select_rows


# ALBEF's temperature: where it starts, and the bounds of what is used.
INITIAL_TEMPERATURE = 0.07
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5


@auto_docstring(custom_intro="Output of [`TripsForRetrieval`].")
@dataclass
class TripsRetrievalOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, *optional*):
        The weighted sum of `itc_loss`, `itm_loss` and `selection_loss`.
    itc_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Image-text contrastive loss, over the batch of all processes.
    itm_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Image-text matching loss.
    selection_loss (`torch.FloatTensor` of shape `()`, *optional*):
        How far the texts' choice of patches in their own images is from their regions or targets: the mean over the
        texts. In training, if either is given and there is a matching loss.
    logits_per_image (`torch.FloatTensor` of shape `(num_images, num_texts)`, *optional*):
        Similarity of each image to each text of this process, divided by the temperature.
    logits_per_text (`torch.FloatTensor` of shape `(num_texts, num_images)`, *optional*):
        Its transpose.
    itm_logits (`torch.FloatTensor` of shape `(3 * num_texts, 2)`, *optional*):
        The pairs of the matching loss: each text with its image, then with a negative image, then each of these images
        with a negative text. Column 1 speaks for a match.
    image_embeds (`torch.FloatTensor` of shape `(num_images, projection_dim)`, *optional*):
        Normalised features of the images.
    text_embeds (`torch.FloatTensor` of shape `(num_texts, projection_dim)`, *optional*):
        Normalised features of the texts.
    selection (`tuple(TripsSelection)`, *optional*):
        What each selection layer kept: of each text's image under its guidance if there is a matching loss, else of
        each image under its own.
    text_model_output (`BaseModelOutputWithPooling`, *optional*):
        Output of the text encoder.
    vision_model_output (`TripsVisionModelOutput`, *optional*):
        Output of the vision tower without a text.
    """

    loss: torch.FloatTensor | None = None
    itc_loss: torch.FloatTensor | None = None
    itm_loss: torch.FloatTensor | None = None
    selection_loss: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    itm_logits: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    selection: tuple[TripsSelection, ...] | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: TripsVisionModelOutput | None = None


@auto_docstring(custom_intro="Output of [`TripsForRetrieval.match`].")
@dataclass
class TripsMatchingOutput(ModelOutput):
    r"""
    itm_logits (`torch.FloatTensor` of shape `(num_pairs, 2)`):
        Column 1 speaks for a match: `itm_logits.softmax(-1)[:, 1]` is its probability.
    selection (`tuple(TripsSelection)`):
        What each selection layer kept of each pair's image.
    selection_losses (`torch.FloatTensor` of shape `(num_pairs,)`, *optional*):
        As in [`TripsModelOutput`].
    """

    itm_logits: torch.FloatTensor | None = None
    selection: tuple[TripsSelection, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    selection_losses: torch.FloatTensor | None = None


class TripsTemperature(nn.Module):
    """
    What similarities are divided by: a parameter, clamped to its bounds. Device maps and int8 checkpoints know only
    parameters of modules like this one, and FSDP shards along a dimension, so that it is no scalar.
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))

    def forward(self) -> torch.Tensor:
        return self.weight.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)


@auto_docstring(
    custom_intro="What retrieval and pre-training share: features that compare images with texts, and matching."
)
class TripsContrastiveModel(TripsPreTrainedModel):  # trf-ignore: TRF013 (the heads call `post_init`, when complete)
    accepts_loss_kwargs = False  # each loss is a mean over its own items: `Trainer` averages accumulated batches

    def __init__(self, config: TripsConfig):
        super().__init__(config)
        if config.fusion_type == "single_stream":
            raise ValueError(
                f"{type(self).__name__} compares features of images with those of texts, but in a single stream no "
                "layer sees one of them alone: choose `fusion_type='cross_attention'` or `'skip_connected'`."
            )
        # CODEPATH: a field that configurations of version 0.1.0 could have.
        if getattr(config, "contrastive_selection", None) == "none":
            raise ValueError(
                "`contrastive_selection='none'` is an option no more. Load with `contrastive_selection='image'`: "
                "features are then of the patches that the image keeps, other ones than before, so train on or make "
                "the index anew. With `keep_rate=1.0` beside it they are as before, but nothing is pruned."
            )
        self.model = TripsModel(config)
        self.vision_proj = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        self.text_proj = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        self.itm_head = nn.Linear(config.fusion_encoder_config.hidden_size, 2)
        self.temp = TripsTemperature()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, TripsTemperature):
            init.constant_(module.weight, INITIAL_TEMPERATURE)

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def parameters_by_objective(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that one objective alone trains, by the name of its weight in the configuration."""
        features = (self.vision_proj, self.text_proj, self.temp)
        return {
            "itc_weight": [parameter for module in features for parameter in module.parameters()],
            "itm_weight": list(self.itm_head.parameters()),
        }

    def unused_parameters(self) -> list[nn.Parameter]:
        """As in the parent, and those of objectives of weight 0."""
        own = self.parameters_by_objective()
        off = [name for name in own if getattr(self.config, name) == 0]
        unused = super().unused_parameters() + [parameter for name in off for parameter in own[name]]
        if {*off, "itc_weight"} == own.keys():  # contrast alone: no text is fused with an image
            unused += self.model.fusion_model.parameters()
            projection = self.model.vision_model.selection_projection
            # CODEPATH: it is there where text and vision differ in width.
            if projection is not None:
                unused += projection.parameters()
        return unused

    @can_return_tuple
    @auto_docstring
    def get_text_features(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        r"""
        Returns:
            The output of the text encoder. Its `pooler_output`, of shape `(num_texts, projection_dim)` and float32 or
            wider, holds the normalised features; its `last_hidden_state` can be given to `match` as `text_states`.
        """
        text_outputs = self.model.text_model(input_ids, attention_mask, token_type_ids, **kwargs)
        text_outputs.pooler_output = _normalized(self.text_proj(text_outputs.pooler_output))
        return text_outputs

    @can_return_tuple
    @auto_docstring
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor | None = None,
        prefix: TripsVisionPrefix | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TripsVisionModelOutput:
        r"""
        prefix (`TripsVisionPrefix`, *optional*):
            Result of `model.encode_images`, in place of `pixel_values`.

        Returns:
            The output of the vision tower without a text. Its `pooler_output`, of shape `(num_images, projection_dim)`
            and float32 or wider, holds the normalised features.
        """
        vision_outputs = self.model.vision_model(pixel_values, prefix=prefix, **kwargs)
        vision_outputs.pooler_output = _normalized(self.vision_proj(vision_outputs.pooler_output))
        return vision_outputs

    @can_return_tuple
    @auto_docstring
    def match(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        prefix: TripsVisionPrefix | None = None,
        text_states: torch.FloatTensor | None = None,
        text_index: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TripsMatchingOutput:
        r"""
        Image-text matching, to rank again what the features found. What depends on the text or on the image alone is
        computed once, however many pairs it is in.

        image_index (`torch.LongTensor` of shape `(num_pairs,)`, *optional*):
            Pair p has image `image_index[p]`. By default image p.
        prefix (`TripsVisionPrefix`, *optional*):
            Result of `model.encode_images`, in place of `pixel_values`.
        text_states (`torch.FloatTensor` of shape `(num_texts, text_length, hidden_size)`, *optional*):
            The `last_hidden_state` of `get_text_features`, in place of `input_ids`.
        text_index (`torch.LongTensor` of shape `(num_pairs,)`, *optional*):
            Pair p has text `text_index[p]`. By default text p.
        """
        if (input_ids is None) == (text_states is None):
            raise ValueError("Specify exactly one of `input_ids` and `text_states`.")
        if text_states is None:
            text_states = self.model.text_model(input_ids, attention_mask, token_type_ids, **kwargs).last_hidden_state
        if text_index is not None:
            text_states, attention_mask = _select_texts(text_index, text_states, attention_mask)
        fused = self.model.fuse(text_states, attention_mask, pixel_values, image_index, prefix, **kwargs)
        return TripsMatchingOutput(
            itm_logits=self.itm_head(fused.last_hidden_state[:, 0]),
            selection=fused.selection,
            hidden_states=fused.hidden_states,
            attentions=fused.attentions,
            cross_attentions=fused.cross_attentions,
            selection_losses=fused.selection_losses,
        )

    def compare(self, text_outputs, image_outputs) -> TripsRetrievalOutput:
        """The similarities of all images and texts, from their features."""
        image_embeds, text_embeds = image_outputs.pooler_output, text_outputs.pooler_output
        image_embeds = image_embeds.to(text_embeds.device)  # the parts may lie on several devices
        logits_per_text = similarity(text_embeds, image_embeds, self.temp())
        return TripsRetrievalOutput(
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            selection=image_outputs.selection,
            text_model_output=text_outputs,
            vision_model_output=image_outputs,
        )

    def pair_losses(
        self,
        text_outputs: BaseModelOutputWithPooling,
        prefix: TripsVisionPrefix,
        attention_mask: torch.Tensor | None,
        image_index: torch.LongTensor | None,
        image_ids: torch.LongTensor | None,
        contrastive_loss: Callable[..., torch.Tensor] = contrastive_loss,
        regions: torch.Tensor | None = None,
        patch_targets: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> dict:
        """The fields of the output of `forward` with its losses, from what text and image give on their own."""
        text_states = text_outputs.last_hidden_state
        image_index, image_ids = check_captions(text_states, len(prefix.hidden_states), image_index, image_ids)
        pair_ids = image_ids[image_index]
        config = self.config
        itc_loss = itm_loss = selection_loss = None
        outputs = {"text_embeds": text_outputs.pooler_output, "text_model_output": text_outputs}
        pair_logits = torch.zeros(len(pair_ids), len(pair_ids), device=pair_ids.device)
        # CODEPATH: a weight of 0 leaves out a loss and all that it alone needs.
        if config.itc_weight > 0:
            outputs = self.compare(text_outputs, self.get_image_features(prefix=prefix, **kwargs))
            embeds = outputs.image_embeds, outputs.text_embeds
            itc_loss = contrastive_loss(*embeds, self.temp(), image_ids, pair_ids)
            pair_logits = outputs.logits_per_text[:, image_index]
        # CODEPATH: as above.
        if config.itm_weight > 0:
            pairs = matching_pairs(pair_logits, pair_ids)
            matched = self.match(
                attention_mask=attention_mask,
                image_index=image_index[pairs.image_index],
                prefix=prefix,
                text_states=text_states,
                text_index=pairs.text_index,
                regions=_of_true_pairs(regions, len(pairs.labels)),
                patch_targets=_of_true_pairs(patch_targets, len(pairs.labels)),
                **kwargs,
            )
            itm_loss = matching_loss(matched.itm_logits, pairs.labels, pairs.weights)
            if matched.selection_losses is not None:
                selection_loss = matched.selection_losses.sum() / mean_count(pair_ids.new_full((), len(pair_ids)))
            true_pairs = torch.arange(len(pair_ids), device=pair_ids.device)
            selection = select_rows(matched.selection, true_pairs)
            outputs = {**outputs, "itm_logits": matched.itm_logits, "selection": selection}
        losses = {"itc_loss": itc_loss, "itm_loss": itm_loss, "selection_loss": selection_loss}
        weights = (config.itc_weight, config.itm_weight, config.selection_loss_weight)
        return {**outputs, **losses, "loss": weighted_sum(*zip(weights, losses.values()))}


@auto_docstring(
    custom_intro="""
    TRIPS for image-text retrieval, in ALBEF's two stages. The features of images and texts do not know of each other,
    so that both can be indexed: no text selects an image's patches there, its own [CLS] does. The best few are then
    compared in depth by `match`: the text selects the patches and is fused with them.
    """
)
class TripsForRetrieval(TripsContrastiveModel):
    def __init__(self, config: TripsConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        regions: torch.FloatTensor | None = None,
        patch_targets: torch.FloatTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TripsRetrievalOutput:
        r"""
        image_index (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
            Text i is a caption of image `image_index[i]`, for the losses. By default text i is one of image i.
        image_ids (`torch.LongTensor` of shape `(num_images,)`, *optional*):
            Images of equal id, in this process or another, are the same: the texts of each are right for all of them.
            By default all images are distinct.
        return_loss (`bool`, *optional*):
            Whether to compute the losses. By default, if `image_ids` are given.
        regions (`torch.FloatTensor` of shape `(num_texts, 4)`, *optional*):
            What each text is about in its own image, see [`TripsModel`].
        patch_targets (`torch.FloatTensor` of shape `(num_texts, num_patches)`, *optional*):
            Where a teacher looks, see [`TripsModel`].
        """
        if return_loss is None:
            return_loss = image_ids is not None
        text_outputs = self.get_text_features(input_ids, attention_mask, token_type_ids, **kwargs)
        if return_loss:
            prefix = self.model.encode_images(pixel_values, **kwargs)
            teaching = {"regions": regions, "patch_targets": patch_targets}
            outputs = self.pair_losses(
                text_outputs, prefix, attention_mask, image_index, image_ids, **teaching, **kwargs
            )
            if outputs["loss"] is None:
                raise ValueError("`itc_weight` and `itm_weight` are both 0: there is no loss. Give one a weight.")
            return TripsRetrievalOutput(**outputs)
        return self.compare(text_outputs, self.get_image_features(pixel_values, **kwargs))


def _normalized(embeds: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(embeds.to(torch.promote_types(embeds.dtype, torch.float32)), dim=-1)


def _of_true_pairs(rows: torch.Tensor | None, num_pairs: int) -> torch.Tensor | None:
    """What teaches the texts, which are the first pairs; zeros, which teach nothing, for the negative pairs."""
    return None if rows is None else nn.functional.pad(rows, (0, 0, 0, num_pairs - len(rows)))


def _select_texts(
    index: torch.LongTensor, text_states: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return text_states[index], attention_mask[index] if attention_mask is not None else None


TripsForRetrieval.register_for_auto_class("AutoModelForZeroShotImageClassification")

__all__ = ["TripsContrastiveModel", "TripsForRetrieval", "TripsMatchingOutput", "TripsRetrievalOutput"]
