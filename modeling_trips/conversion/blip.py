"""
Conversion of Transformers' `BlipForQuestionAnswering` (BLIP, https://arxiv.org/abs/2201.12086).

All layers of BLIP's text encoder have cross-attention, so all become fusion layers. No text-only layer remains whose
[CLS] could score patches, so patches are scored by the image.
"""

from collections.abc import Mapping

import torch
from transformers import BlipConfig

from ..configuration_trips import TripsVisionConfig
from ..modeling_trips import TripsForQuestionAnswering
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
    stacked_attention,
)


def blip_plan(
    source: Mapping[str, torch.Tensor], blip_config: BlipConfig, image_size: int | None = None, **selection
) -> ConversionPlan:
    """
    Plan the conversion of a `BlipForQuestionAnswering` to a [`TripsForQuestionAnswering`]. Without selection both give
    the same outputs, except for padded questions: BLIP's decoder attends to padding, TRIPS's does not.

    Args:
        source (`dict[str, torch.Tensor]`): State dict of the model.
        blip_config ([`BlipConfig`]): Configuration of the model.
        image_size (`int`, *optional*): New resolution, for which positions are interpolated.
        selection: Fields of [`TripsConfig`] that set the selection. Default: the paper's, by the image.

    Raises:
        ConversionError: The guidance is `"text"` in any layer.
    """
    selection = {"schedule": "5:image:0.7,10:image:0.7"} | selection
    vision = blip_config.vision_config
    text = blip_config.text_config
    config = make_config(
        vision_config={
            **fields_of(vision, VISION_FIELDS),
            "image_size": image_size or vision.image_size,
            "attention_probs_dropout_prob": vision.attention_dropout,
            "initializer_range": text.initializer_range,  # BLIP's vision tower has 1e-10
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
    schedule = config.vision_config.schedule
    if schedule.text_layers:
        raise ConversionError(f"BLIP has no text-only layers to score by the text. Use 'image', got {schedule}.")
    grid = TripsVisionConfig(image_size=vision.image_size, patch_size=vision.patch_size).grid_size
    embeddings = "text_decoder.bert.embeddings.word_embeddings.weight"
    lm_rules, left_out, tied = lm_head_rules("lm_head", "text_decoder.cls.predictions", embeddings, source)
    config.tie_word_embeddings = tied
    return ConversionPlan(
        model_class=TripsForQuestionAnswering,
        config=config,
        rules=_rules(grid, config.vision_config.grid_size) + lm_rules,
        left_out=left_out,
        new=(r"model\.vision_model\.selection_projection\..*",),
        zero=(r"(model\.text_model|decoder)\.embeddings\.token_type_embeddings\.weight",),  # BLIP has none
    )


def _rules(grid: tuple[int, int], new_grid: tuple[int, int]) -> tuple[Rule, ...]:
    embeddings = r"model\.vision_model\.embeddings\."
    layer = r"model\.vision_model\.layers\.(\d+)\."
    source = r"vision_model.encoder.layers.\1."
    text = r"embeddings\.(?!token_type_embeddings)(.*)"
    resample = resampled(grid, new_grid)
    return (
        Rule(embeddings + "cls_token", "vision_model.embeddings.class_embedding"),
        Rule(embeddings + "position_embeddings", "vision_model.embeddings.position_embedding", resample),
        Rule(embeddings + r"patch_embeddings\.projection\.(.*)", r"vision_model.embeddings.patch_embedding.\1"),
        Rule(layer + r"layernorm_before\.(.*)", source + r"layer_norm1.\2"),
        *stacked_attention(layer, source + "self_attn.qkv"),
        Rule(layer + r"attention\.o_proj\.(.*)", source + r"self_attn.projection.\2"),
        Rule(layer + r"layernorm_after\.(.*)", source + r"layer_norm2.\2"),
        Rule(layer + r"mlp\.(.*)", source + r"mlp.\2"),
        Rule(r"model\.vision_model\.layernorm\.(.*)", r"vision_model.post_layernorm.\1"),
        Rule(r"model\.text_model\." + text, r"text_encoder.embeddings.\1"),
        Rule(r"model\.fusion_model\.(.*)", r"text_encoder.\1"),
        Rule(r"decoder\." + text, r"text_decoder.bert.embeddings.\1"),
        Rule(r"decoder\.encoder\.(.*)", r"text_decoder.bert.encoder.\1"),
    )
