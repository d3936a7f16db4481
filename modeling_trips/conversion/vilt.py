"""
Conversion of Transformers' ViLT (https://arxiv.org/abs/2102.03334) to a single-stream TRIPS model.

ViLT's heads are left out, because heads of TRIPS read the fused states, not the outputs of ViLT's pooler.
"""

from collections.abc import Mapping

import torch
from transformers import ViltConfig

from ..configuration_trips import TripsVisionConfig
from ..modeling_trips import TripsModel
from ..modeling_trips_vision import NUM_MODALITIES, TripsPreTrainedModel
from .rules import TEXT_FIELDS, VISION_FIELDS, ConversionPlan, Rule, fields_of, make_config, resampled


TEXT, VISION = (rf"(?:model\.)?{part}_model\." for part in ("text", "vision"))


def vilt_plan(
    source: Mapping[str, torch.Tensor],
    vilt_config: ViltConfig,
    model_class: type[TripsPreTrainedModel] = TripsModel,
    image_size: int | None = None,
    decoder_config: dict | None = None,
    **selection,
) -> ConversionPlan:
    """
    Plan the conversion of a ViLT to a [`TripsModel`] with `fusion_type="single_stream"`, or to one with a new head.
    Without selection both give the same outputs for images of the configured size. ViLT pads images of different
    sizes and interpolates positions bilinearly; TRIPS resizes images and interpolates positions bicubically.

    Args:
        source (`dict[str, torch.Tensor]`): State dict of `ViltModel` or of a ViLT with a head.
        vilt_config ([`ViltConfig`]): Configuration of the model.
        model_class (`type`, *optional*, defaults to [`TripsModel`]): TRIPS class.
        image_size (`int`, *optional*): New resolution, for which positions are interpolated.
        decoder_config (`dict`, *optional*): Fields of the decoder of a generative head.
        selection: Fields of [`TripsConfig`] that set the selection.
    """
    pad_token_id = 0 if vilt_config.pad_token_id is None else vilt_config.pad_token_id  # BERT's
    config = make_config(
        vision_config={
            **fields_of(vilt_config, VISION_FIELDS),
            "image_size": image_size or vilt_config.image_size,
        },
        text_config=fields_of(vilt_config, TEXT_FIELDS) | {"pad_token_id": pad_token_id},
        decoder_config=decoder_config,
        fusion_type="single_stream",
        **selection,
    )
    vilt = "vilt." if any(key.startswith("vilt.") for key in source) else ""
    grid = TripsVisionConfig(image_size=vilt_config.image_size, patch_size=vilt_config.patch_size).grid_size
    return ConversionPlan(
        model_class=model_class,
        config=config,
        rules=_rules(vilt, grid, config.vision_config.grid_size),
        left_out={
            rf"{vilt}pooler\..*": "the pooler",
            rf"{vilt}embeddings\.text_embeddings\.position_ids": "position numbers",
            r"(mlm_score|itm_score|classifier|rank_output)\..*": "ViLT's heads",
        },
        new=(rf"(?!{TEXT}|{VISION}).*",),
    )


def _rules(vilt: str, grid: tuple[int, int], new_grid: tuple[int, int]) -> tuple[Rule, ...]:
    embeddings = VISION + r"embeddings\."
    layer = VISION + r"layers\.(\d+)\."
    source = vilt + r"encoder.layer.\1."
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    return (
        Rule(TEXT + r"embeddings\.(.*)", vilt + r"embeddings.text_embeddings.\1"),
        Rule(embeddings + "position_embeddings", f"{vilt}embeddings.position_embeddings", resampled(grid, new_grid)),
        Rule(embeddings + r"(cls_token|patch_embeddings\..*)", vilt + r"embeddings.\1"),
        Rule(
            VISION + r"modality_embeddings\.weight",
            f"{vilt}embeddings.token_type_embeddings.weight",
            lambda table: table[:NUM_MODALITIES],  # ViLT for NLVR2 has a third row for the second image
        ),
        Rule(layer + r"attention\.o_proj\.(.*)", source + r"attention.output.dense.\2"),
        Rule(
            layer + r"attention\.([qkv]_proj)\.(.*)",
            lambda match: f"{vilt}encoder.layer.{match[1]}.attention.attention.{names[match[2]]}.{match[3]}",
        ),
        Rule(layer + r"mlp\.fc1\.(.*)", source + r"intermediate.dense.\2"),
        Rule(layer + r"mlp\.fc2\.(.*)", source + r"output.dense.\2"),
        Rule(layer + r"(layernorm_(?:before|after)\..*)", source + r"\2"),
        Rule(VISION + r"layernorm\.(.*)", vilt + r"layernorm.\1"),
    )
