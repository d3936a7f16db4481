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
"""The head for visual grounding: the box of the object that a text describes."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.image_transforms import center_to_corners_format
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, can_return_tuple

from .configuration_trips import SelectionSchedule, TripsConfig
from .modeling_trips import TripsModel, mean_over_items, weighted_sum
from .modeling_trips_vision import (
    SHARED_ARGS,
    TripsImageCache,
    TripsPreTrainedModel,
    TripsSelection,
    check_shape,
    class_states,
    next_candidates,
    select_rows,
)
from .patch_selection import SMALLEST_AREA, SMALLEST_ATTENTION, divergence, region_targets


# Losses


# DETR's weights.
L1_WEIGHT = 5.0
GIOU_WEIGHT = 2.0


def _areas(boxes: torch.Tensor) -> torch.Tensor:
    x0, y0, x1, y1 = boxes.unbind(-1)
    return (x1 - x0) * (y1 - y0)


def _iou_and_unions(boxes: torch.Tensor, target_boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    top_left = torch.maximum(boxes[..., :2], target_boxes[..., :2])
    bottom_right = torch.minimum(boxes[..., 2:], target_boxes[..., 2:])
    sides = (bottom_right - top_left).clamp(min=0)
    widths, heights = sides.unbind(-1)
    intersections = widths * heights
    unions = _areas(boxes) + _areas(target_boxes) - intersections
    return intersections / unions.clamp(min=SMALLEST_AREA), unions


def paired_box_iou(boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
    """
    Return the intersection over union of box i and target box i, `(num_boxes,)`; 0 if both boxes have no area. Boxes
    `(num_boxes, 4)` are corners (x0, y0, x1, y1). (`torchvision.ops.box_iou` returns it for all pairs.)
    """
    iou, _ = _iou_and_unions(boxes, target_boxes)
    return iou


def generalized_box_iou_loss(boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
    """
    Return `1 - GIoU` of box i and target box i (https://arxiv.org/abs/1902.09630), `(num_boxes,)`, in [0, 2]. Boxes
    are as in `paired_box_iou`. `torchvision.ops.generalized_box_iou_loss` returns the same but syncs with the device.
    """
    iou, unions = _iou_and_unions(boxes, target_boxes)
    top_left = torch.minimum(boxes[..., :2], target_boxes[..., :2])
    bottom_right = torch.maximum(boxes[..., 2:], target_boxes[..., 2:])
    enclosing_boxes = torch.cat((top_left, bottom_right), dim=-1)
    enclosing_areas = _areas(enclosing_boxes)
    empty_share = (enclosing_areas - unions) / enclosing_areas.clamp(min=SMALLEST_AREA)
    return 1 - iou + empty_share


def attention_losses(
    weights: torch.Tensor, indices: torch.LongTensor, regions: torch.Tensor, grid_size: tuple[int, int]
) -> torch.Tensor:
    """
    Return the attention supervision: the [`selection_loss`] of attention to the kept patches, `(num_texts,)`, float32.
    It is 0 if no kept patch lies in the region.

    Attention to a fused token is not counted. A penalty would make the fused token unlike the region, and through its
    weights would raise the scores of patches outside of the region.

    Args:
        weights (`torch.Tensor` of shape `(num_texts, num_tokens)`): Attention to the image tokens after [CLS]. With
            all other tokens, rows sum to 1.
        indices (`torch.LongTensor` of shape `(num_texts or 1, num_tokens)`): Row-major index of
            each token's patch, negative for a fused token.
        regions, grid_size: See [`region_targets`].
    """
    indices = indices.to(weights.device).expand_as(weights)
    is_patch = indices >= 0
    weight_of_fused = weights.masked_fill(is_patch, 0.0)
    weight_of_fused = weight_of_fused.sum(dim=-1, keepdim=True)  # (num_texts, 1)
    weights = weights / (1.0 - weight_of_fused).clamp(min=SMALLEST_ATTENTION)
    patch_targets = region_targets(regions.to(weights.device), grid_size)  # (num_texts, num_patches)
    targets = patch_targets.gather(1, indices.clamp(min=0))  # (num_texts, num_tokens)
    return divergence(weights, targets * is_patch)


# Head


GROUNDING_ARGS = r"""
labels (`torch.FloatTensor` of shape `(num_texts, 4)`, *optional*):
    The box of each text, in the format of `pred_boxes`. [`TripsProcessor.encode_boxes`] converts pixels to it.
"""


@auto_docstring(custom_intro="Output of [`TripsForVisualGrounding`].")
@dataclass
class TripsVisualGroundingOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
        `L1_WEIGHT * l1_loss + GIOU_WEIGHT * giou_loss` (DETR's 5 and 2), and in training
        `config.selection_loss_weight * selection_loss + config.attention_loss_weight * attention_loss`.
    l1_loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
        L1 distance of predicted box and label, summed over the four numbers, per box.
    giou_loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
        1 - generalized IoU of predicted box and label, per box.
    selection_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Selection supervision by the boxes. Returned in training, if a layer is scored by the text or the image.
    relevance_values (`tuple(torch.FloatTensor)`, *optional*):
        As in [`TripsModelOutput`]. The mean of its `relevance_losses` is a part of the loss.
    attention_loss (`torch.FloatTensor` of shape `()`, *optional*):
        Attention supervision of the box head. Returned in training, unless its weight is 0.
    pred_boxes (`torch.FloatTensor` of shape `(num_texts, 4)`):
        Box (center_x, center_y, width, height) of each text, float32, in [0, 1] of the processed image. Use
        [`TripsProcessor.post_process_grounding`] to get pixels of the original image.
    selection (`tuple(TripsSelection)`):
        Kept patches of each selection layer.
    """

    loss: torch.FloatTensor | None = None
    l1_loss: torch.FloatTensor | None = None
    giou_loss: torch.FloatTensor | None = None
    selection_loss: torch.FloatTensor | None = None
    relevance_values: tuple[torch.FloatTensor, ...] | None = None
    attention_loss: torch.FloatTensor | None = None
    pred_boxes: torch.FloatTensor | None = None
    selection: tuple[TripsSelection, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


class TripsBoxHead(nn.Module):
    """
    Box head with a reference point. The fused [CLS] attends to the remaining image tokens, and the mean of their
    positions is the reference point. DETR's box head (three linear layers with ReLU) predicts the offset from it and
    the size of the box. Conditional DETR (https://arxiv.org/abs/2108.06152) predicts the point from the query alone.
    """

    def __init__(self, config: TripsConfig):
        super().__init__()
        hidden_size = config.fusion_encoder_config.hidden_size
        image_hidden_size = config.vision_config.hidden_size
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(image_hidden_size, hidden_size)
        self.value = nn.Linear(image_hidden_size, hidden_size)
        self.layers = nn.ModuleList(
            [
                nn.Linear(hidden_size, hidden_size),
                nn.Linear(hidden_size, hidden_size),
                nn.Linear(hidden_size, 4),
            ]
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_states: torch.Tensor,
        image_centers: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(num_texts, hidden_size)`): the fused [CLS].
            image_states (`torch.Tensor` of shape `(num_texts, num_tokens, image_hidden_size)`)
            image_centers (`torch.Tensor` of shape `(num_texts or 1, num_tokens, 2)`): see `token_centers`.

        Returns:
            `torch.Tensor` of shape `(num_texts, 4)`: boxes (center_x, center_y, width, height), float32, in [0, 1].
            `torch.Tensor` of shape `(num_texts, num_tokens)`: attention to each token, float32; rows sum to 1.
        """
        query = self.query(hidden_states)  # (num_texts, hidden_size)
        key = self.key(image_states)  # (num_texts, num_tokens, hidden_size)
        value = self.value(image_states)
        logits = key @ query[:, :, None]  # (num_texts, num_tokens, 1)
        logits = logits[..., 0] / query.shape[-1] ** 0.5
        weights = logits.float().softmax(dim=-1)

        # Not a matmul: autocast would round the positions.
        reference_point = (weights[..., None] * image_centers).sum(dim=1).logit()  # (num_texts, 2)

        attn_output = weights[:, None].to(value.dtype) @ value  # (num_texts, 1, hidden_size)
        hidden_states = hidden_states + attn_output[:, 0]
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states)
            hidden_states = nn.functional.relu(hidden_states)
        box = self.layers[-1](hidden_states).float()  # (num_texts, 4)
        offset, size = box.split(2, dim=-1)
        boxes = torch.cat((reference_point + offset, size), dim=-1).sigmoid()
        return boxes, weights


def token_indices(selection: tuple[TripsSelection, ...], image_states: torch.Tensor) -> torch.LongTensor:
    """
    Return the patch of each image token after [CLS], `(num_texts or 1, num_tokens)`: its row-major index, negative for
    a fused token.
    """
    num_tokens = image_states.shape[1]
    if not selection:
        return torch.arange(num_tokens, device=image_states.device)[None]
    return next_candidates(selection[-1], num_tokens).to(image_states.device)


def token_centers(indices: torch.LongTensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """
    Return the centers (x, y) of patches, `(num_texts or 1, num_tokens, 2)`, float32, in [0, 1]. Fused tokens (see
    `token_indices`) get the center of the image.
    """
    num_rows, num_columns = grid_size
    columns = indices % num_columns
    rows = indices.div(num_columns, rounding_mode="floor")
    x = (columns + 0.5) / num_columns
    y = (rows + 0.5) / num_rows
    centers = torch.stack((x, y), dim=-1)
    return centers.masked_fill(indices[..., None] < 0, 0.5)


@auto_docstring(
    custom_intro="""
    TRIPS with a box head. The text is a referring expression. It selects the patches and is fused with them, and its
    [CLS] predicts the box of the object that it describes.
    """
)
class TripsForVisualGrounding(TripsPreTrainedModel):
    auto_classes = ("AutoModelForZeroShotObjectDetection",)

    def __init__(self, config: TripsConfig):
        super().__init__(config)
        self.model = TripsModel(config)
        self.box_head = TripsBoxHead(config)
        self.post_init()

    @can_return_tuple
    @auto_docstring(custom_args=SHARED_ARGS + GROUNDING_ARGS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        image_index: torch.LongTensor | None = None,
        image_cache: TripsImageCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.FloatTensor | None = None,
        schedule: SelectionSchedule | str | None = None,
        keep_rate: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TripsVisualGroundingOutput:
        r"""
        Example:

        ```python
        >>> import torch
        >>> from modeling_trips import TripsConfig, TripsForVisualGrounding

        >>> model = TripsForVisualGrounding(TripsConfig.from_preset("tiny")).eval()
        >>> outputs = model(torch.tensor([[2, 5, 6, 3]]), torch.randn(1, 3, 64, 64))
        >>> tuple(outputs.pred_boxes.shape)
        (1, 4)
        ```
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            image_index=image_index,
            image_cache=image_cache,
            inputs_embeds=inputs_embeds,
            regions=labels,
            schedule=schedule,
            keep_rate=keep_rate,
            **kwargs,
        )
        vision = outputs.vision_model_output
        image_states = select_rows(vision.last_hidden_state, vision.image_index)
        image_states = image_states[:, 1:]  # (num_texts, num_tokens, image_hidden_size)
        grid_size = self.model.grid_of(pixel_values, image_cache)
        indices = token_indices(outputs.selection, image_states)
        class_state = class_states(outputs.last_hidden_state, attention_mask)  # (num_texts, hidden_size)
        pred_boxes, weights = self.box_head(class_state, image_states, token_centers(indices, grid_size))
        loss = None
        l1_loss = None
        giou_loss = None
        selection_loss = None
        attention_loss = None
        if labels is not None:
            num_items = kwargs.get("num_items_in_batch")
            l1_loss, giou_loss = box_losses(pred_boxes, labels, num_items)
            selection_loss = mean_over_boxes(outputs.selection_losses, num_items)
            # CODEPATH: a weight of 0, the default, leaves the loss out.
            if self.training and self.config.attention_loss_weight > 0:
                losses = attention_losses(weights, indices, labels, grid_size)
                attention_loss = mean_over_boxes(losses, num_items)
            loss = weighted_sum(
                [
                    (L1_WEIGHT, l1_loss),
                    (GIOU_WEIGHT, giou_loss),
                    (self.config.selection_loss_weight, selection_loss),
                    (1.0, mean_over_boxes(outputs.relevance_losses, num_items)),
                    (self.config.attention_loss_weight, attention_loss),
                ]
            )
        return TripsVisualGroundingOutput(
            loss=loss,
            l1_loss=l1_loss,
            giou_loss=giou_loss,
            selection_loss=selection_loss,
            relevance_values=outputs.relevance_values,
            attention_loss=attention_loss,
            pred_boxes=pred_boxes,
            selection=outputs.selection,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )


def box_losses(
    pred_boxes: torch.Tensor, labels: torch.Tensor, num_items_in_batch: int | torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the L1 and the generalized IoU loss of boxes (center_x, center_y, width, height), each the mean over boxes.

    `Trainer` counts four items per box in `num_items_in_batch`. With it, gradient accumulation and several processes
    give the gradient of the whole batch.
    """
    check_shape("labels", labels, *pred_boxes.shape)
    labels = labels.to(pred_boxes)
    l1_losses = (pred_boxes - labels).abs().sum(dim=-1)  # (num_texts,)
    giou_losses = generalized_box_iou_loss(center_to_corners_format(pred_boxes), center_to_corners_format(labels))
    l1_loss = mean_over_boxes(l1_losses, num_items_in_batch)
    giou_loss = mean_over_boxes(giou_losses, num_items_in_batch)
    return l1_loss, giou_loss


def mean_over_boxes(
    losses: torch.Tensor | None, num_items_in_batch: int | torch.Tensor | None = None
) -> torch.Tensor | None:
    """Return [`mean_over_items`] of the losses, `(num_texts,)`, with four items per box."""
    if losses is None:
        return None
    return mean_over_items(losses, torch.full_like(losses, 4), num_items_in_batch)


TripsForVisualGrounding.register_for_auto_class("AutoModelForZeroShotObjectDetection")

__all__ = ["TripsForVisualGrounding", "TripsVisualGroundingOutput"]
