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
BLIP (https://arxiv.org/abs/2201.12086), as Transformers has it, -> TRIPS: `BlipForQuestionAnswering`.

BLIP's text encoder attends to the image from its first layer on. All its layers become fusion layers; none is left
that sees the text alone, whose [CLS] could guide the selection. So the image guides itself.
"""

from collections.abc import Mapping

import torch
from transformers import BlipConfig

from ..configuration_trips import TripsVisionConfig
from .rules import (
    TEXT_FIELDS,
    VISION_FIELDS,
    ConversionError,
    ConversionPlan,
    Rule,
    fields_of,
    lm_head_rules,
    make_config,
    resampled,
    third,
)


WHY_NOT = {
    "BlipForImageTextRetrieval": (
        "the layers that compare a text with an image also encode the text without it, while TRIPS has layers of its "
        "own for each"
    ),
    "BlipForConditionalGeneration": "its decoder reads the image, while that of TRIPS reads a text that has seen it",
}


def check_blip_architecture(architecture: str):
    """Raises a [`ConversionError`] that says why unless TRIPS can compute what the BLIP class computes."""
    if architecture != "BlipForQuestionAnswering":
        why = WHY_NOT.get(architecture, "only BlipForQuestionAnswering is known")
        raise ConversionError(
            f"A {architecture} cannot become a TRIPS model: {why}. To select patches in a BLIP model as it is, use "
            "`apply_patch_selection`."
        )


def blip_plan(
    source: Mapping[str, torch.Tensor], blip_config: BlipConfig, image_size: int | None = None, **selection
) -> ConversionPlan:
    """
    How a `BlipForQuestionAnswering` becomes a [`TripsForQuestionAnswering`]. Without selection both compute the same,
    but for padded questions: BLIP's decoder in Transformers attends to the padding, and this one does not.

    Args:
        source (`dict[str, torch.Tensor]`): the model's state dict.
        blip_config ([`BlipConfig`]): its configuration.
        image_size (`int`, *optional*): another resolution than the model's, whose positions are interpolated.
        selection: the fields of [`TripsConfig`] that set the selection. The guidance is `"image"` by default.

    Raises:
        ConversionError: if the guidance is to be the text.
    """
    selection = {"selection_guidance": "image"} | selection
    if "text" in selection["selection_guidance"]:  # as the one for all layers, or as one of several
        raise ConversionError(
            "`selection_guidance` cannot be 'text': BLIP has no layers that see the text alone, before the image."
        )
    vision, text = blip_config.vision_config, blip_config.text_config
    config = make_config(
        vision_config={
            **fields_of(vision, VISION_FIELDS),
            "image_size": image_size or vision.image_size,
            "attention_probs_dropout_prob": vision.attention_dropout,
            "initializer_range": text.initializer_range,  # that of BLIP's vision tower is next to nothing
        },
        text_config=fields_of(text, TEXT_FIELDS) | {"num_hidden_layers": 0},
        fusion_encoder_config={"num_hidden_layers": text.num_hidden_layers},
        decoder_config={
            "num_hidden_layers": text.num_hidden_layers,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.sep_token_id,
        },
        **selection,
    )
    grid = TripsVisionConfig(image_size=vision.image_size, patch_size=vision.patch_size).grid_size
    embeddings = "text_decoder.bert.embeddings.word_embeddings.weight"
    lm_rules, left_out, tied = lm_head_rules("lm_head", "text_decoder.cls.predictions", embeddings, source)
    config.tie_word_embeddings = tied
    return ConversionPlan(
        model_class="TripsForQuestionAnswering",
        config=config,
        rules=_rules(grid, config.vision_config.grid_size) + lm_rules,
        left_out=left_out,
        new=(r"model\.vision_model\.selection_projection\..*",),
        zero=(r"(model\.text_model|decoder)\.embeddings\.token_type_embeddings\.weight",),  # BLIP has none
    )


def _rules(grid: tuple[int, int], new_grid: tuple[int, int]) -> tuple[Rule, ...]:
    embeddings = r"model\.vision_model\.embeddings\."
    layer, source = r"model\.vision_model\.layers\.(\d+)\.", r"vision_model.encoder.layers.\1."
    text = r"embeddings\.(?!token_type_embeddings)(.*)"
    return (
        Rule(embeddings + "cls_token", "vision_model.embeddings.class_embedding"),
        Rule(
            embeddings + "position_embeddings",
            "vision_model.embeddings.position_embedding",
            resampled(grid, new_grid),
        ),
        Rule(embeddings + r"patch_embeddings\.projection\.(.*)", r"vision_model.embeddings.patch_embedding.\1"),
        Rule(layer + r"layernorm_before\.(.*)", source + r"layer_norm1.\2"),
        Rule(layer + r"attention\.q_proj\.(.*)", source + r"self_attn.qkv.\2", third(0)),
        Rule(layer + r"attention\.k_proj\.(.*)", source + r"self_attn.qkv.\2", third(1)),
        Rule(layer + r"attention\.v_proj\.(.*)", source + r"self_attn.qkv.\2", third(2)),
        Rule(layer + r"attention\.o_proj\.(.*)", source + r"self_attn.projection.\2"),
        Rule(layer + r"layernorm_after\.(.*)", source + r"layer_norm2.\2"),
        Rule(layer + r"mlp\.(.*)", source + r"mlp.\2"),
        Rule(r"model\.vision_model\.layernorm\.(.*)", r"vision_model.post_layernorm.\1"),
        Rule(r"model\.text_model\." + text, r"text_encoder.embeddings.\1"),
        Rule(r"model\.fusion_model\.(.*)", r"text_encoder.\1"),
        Rule(r"decoder\." + text, r"text_decoder.bert.embeddings.\1"),
        Rule(r"decoder\.encoder\.(.*)", r"text_decoder.bert.encoder.\1"),
    )
