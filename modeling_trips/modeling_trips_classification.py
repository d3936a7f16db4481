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
"""The head that classifies a text together with one image or several."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple

from .configuration_trips import SelectionSchedule, TripsConfig
from .modeling_trips import TripsModel, mean_over_items, weighted_sum
from .modeling_trips_vision import (
    SHARED_ARGS,
    TripsImageCache,
    TripsPreTrainedModel,
    TripsSelection,
    check_shape,
    class_states,
)


@auto_docstring(custom_intro="Output of [`TripsForImagesAndTextClassification`].")
@dataclass
class TripsForImagesAndTextClassificationOutput(SequenceClassifierOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
        Cross-entropy of the labels, per text, plus `config.selection_loss_weight * selection_loss`. NaN, as of
        Transformers' heads, if all labels are -100 and `num_items_in_batch` does not count other ones.
    selection_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Selection supervision, the mean over texts and images. Returned in training, if regions are given.
    relevance_values (`tuple(torch.FloatTensor)`, *optional*):
        As in [`TripsModelOutput`]. The mean of its `relevance_losses` is a part of the loss.
    logits (`torch.FloatTensor` of shape `(num_texts, config.num_labels)`):
        Scores of the classes, before the softmax.
    selection (`tuple(TripsSelection)`):
        Kept patches of each selection layer. Row `i * num_images + j` is image j of text i, here and in
        `hidden_states`, `attentions` and `cross_attentions` of the fusion encoder.
    """

    selection_loss: torch.FloatTensor | None = None
    relevance_values: tuple[torch.FloatTensor, ...] | None = None
    selection: tuple[TripsSelection, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


class TripsImagesAndTextClassificationHead(nn.Module):
    """ViLT's head for NLVR2, over the concatenated [CLS] states of the images."""

    def __init__(self, config: TripsConfig, num_images: int):
        super().__init__()
        fusion_config = config.fusion_encoder_config
        hidden_size = num_images * fusion_config.hidden_size
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=fusion_config.layer_norm_eps)
        self.activation_fn = ACT2FN[fusion_config.hidden_act]
        self.out_proj = nn.Linear(hidden_size, config.num_labels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dense(hidden_states)
        hidden_states = self.LayerNorm(hidden_states)
        hidden_states = self.activation_fn(hidden_states)
        return self.out_proj(hidden_states)


# Own arguments of `forward`
CLASSIFICATION_ARGS = r"""
pixel_values (`torch.FloatTensor` of shape `(num_texts, num_images, num_channels, height, width)`, *optional*):
    The images of each text, in order. The shape may also be `(num_all_images, num_channels, height, width)`:
    with `image_index`, distinct images in any order; without it, the images of text 0, then those of text 1,
    and so on.
image_index (`torch.LongTensor` of shape `(num_texts, num_images)`, *optional*):
    Image j of text i is image `image_index[i, j]`. Texts with the same image share its computation.
labels (`torch.LongTensor` of shape `(num_texts,)`, *optional*):
    The class of each text, in `[0, config.num_labels)`; -100 is ignored.
regions (`torch.FloatTensor` of shape `(num_texts, num_images, 4)`, *optional*):
    The target region of each text in each of its images, see [`TripsModel`].
"""


@auto_docstring(
    custom_intro="""
    TRIPS with a classifier of a text and `config.num_images` images: NLVR2 (a statement about two images, true or
    false), or visual entailment with one image. The text is encoded once, selects patches in each of its images, and
    is fused with each of them. The classifier reads the [CLS] states in the order of the images.
    """
)
class TripsForImagesAndTextClassification(TripsPreTrainedModel):
    auto_classes = ("AutoModelForSequenceClassification",)

    def __init__(self, config: TripsConfig):
        super().__init__(config)
        self.num_images = config.num_images
        self.model = TripsModel(config)
        self.classifier = TripsImagesAndTextClassificationHead(config, self.num_images)
        self.post_init()

    @can_return_tuple
    @auto_docstring(custom_args=SHARED_ARGS + CLASSIFICATION_ARGS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_cache: TripsImageCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        regions: torch.FloatTensor | None = None,
        schedule: SelectionSchedule | str | None = None,
        keep_rate: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsForImagesAndTextClassificationOutput:
        r"""
        Example:

        ```python
        >>> import torch
        >>> from modeling_trips import TripsConfig, TripsForImagesAndTextClassification

        >>> model = TripsForImagesAndTextClassification(TripsConfig.from_preset("tiny", num_labels=2)).eval()
        >>> outputs = model(torch.tensor([[2, 5, 6, 3]]), torch.randn(1, 2, 3, 64, 64))
        >>> tuple(outputs.logits.shape)
        (1, 2)
        ```
        """
        text_output = self.model.text_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        num_texts = text_output.last_hidden_state.shape[0]
        pixel_values, image_index = _flatten_images(pixel_values, image_index, num_texts, self.num_images)

        # From here on, row `i * num_images + j` is text i with its image j.
        text_states = text_output.last_hidden_state.repeat_interleave(self.num_images, dim=0)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat_interleave(self.num_images, dim=0)
        check_shape("regions", regions, num_texts, self.num_images, 4)
        if regions is not None:
            regions = regions.flatten(0, 1)  # (num_texts * num_images, 4)
        fused = self.model.fuse(
            text_states=text_states,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_index=image_index,
            image_cache=image_cache,
            regions=regions,
            schedule=schedule,
            keep_rate=keep_rate,
            **kwargs,
        )

        class_state = class_states(fused.last_hidden_state, attention_mask)  # (num_texts * num_images, hidden_size)
        logits = self.classifier(class_state.reshape(num_texts, -1))
        loss = None
        selection_loss = None
        if labels is not None:
            labels = labels.to(logits.device)
            num_items = kwargs.get("num_items_in_batch")
            selection_losses = self.mean_over_images(fused.selection_losses)
            relevance_losses = self.mean_over_images(fused.relevance_losses)
            is_labeled = labels != -100
            selection_loss = mean_over_items(selection_losses, is_labeled, num_items)
            loss = weighted_sum(
                [
                    (1.0, fixed_cross_entropy(logits.float(), labels, num_items)),
                    (self.config.selection_loss_weight, selection_loss),
                    (1.0, mean_over_items(relevance_losses, is_labeled, num_items)),
                ]
            )
        return TripsForImagesAndTextClassificationOutput(
            loss=loss,
            selection_loss=selection_loss,
            relevance_values=fused.relevance_values,
            logits=logits,
            selection=fused.selection,
            hidden_states=fused.hidden_states,
            attentions=fused.attentions,
            cross_attentions=fused.cross_attentions,
        )

    def mean_over_images(self, losses: torch.Tensor | None) -> torch.Tensor | None:
        """Return the mean loss of the images of each text, `(num_texts,)`; `None` stays `None`."""
        return None if losses is None else losses.view(-1, self.num_images).mean(dim=1)


def _flatten_images(
    pixel_values: torch.Tensor | None,
    image_index: torch.LongTensor | None,
    num_texts: int,
    num_images: int,
) -> tuple[torch.Tensor | None, torch.LongTensor | None]:
    """Return all images as one batch, and `image_index` with one entry per text and image."""
    if pixel_values is not None and pixel_values.ndim == 5:
        check_shape("pixel_values", pixel_values, num_texts, num_images, *pixel_values.shape[2:])
        if image_index is not None:
            raise ValueError("`pixel_values` of five dimensions are the images of each text: omit `image_index`.")
        pixel_values = pixel_values.flatten(0, 1)
    if image_index is not None:
        check_shape("image_index", image_index, num_texts, num_images)
        image_index = image_index.flatten()
    return pixel_values, image_index


TripsForImagesAndTextClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["TripsForImagesAndTextClassification", "TripsForImagesAndTextClassificationOutput"]
