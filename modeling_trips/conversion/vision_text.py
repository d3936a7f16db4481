"""
Conversion of a vision tower (ViT, DeiT, CLIP, DINOv2) and a text encoder (BERT, MiniLM, RoBERTa) of Transformers.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from ..configuration_trips import TripsConfig, TripsVisionConfig
from .rules import (
    TEXT_FIELDS,
    VISION_FIELDS,
    ConversionError,
    ConversionPlan,
    ConversionReport,
    Rule,
    bert_layers,
    fields_of,
    load_converted,
    resampled,
)


logger = logging.get_logger(__name__)

VISION_TYPES = ("vit", "deit", "clip_vision_model", "clip", "dinov2")
SWITCHES = {"cls": "cls_token", "mean": "mean_tokens"}  # of Sentence Transformers before 5
ROBERTA_TYPES = ("roberta", "xlm-roberta")
TEXT_TYPES = ("bert", *ROBERTA_TYPES)

# Parts whose names have no prefix "model." in a bare `TripsModel`.
VISION, TEXT, FUSION = (rf"(?:model\.)?{part}_model" for part in ("vision", "text", "fusion"))


class Tower(NamedTuple):
    """Model of Transformers without head: its configuration and the weights in its checkpoint."""

    config: PreTrainedConfig
    weights: dict[str, torch.Tensor]
    keys_of_heads: list[str]


def from_vision_text_pretrained(
    model_class: type[PreTrainedModel],
    vision: str | os.PathLike | PreTrainedModel,
    text: str | os.PathLike | PreTrainedModel,
    num_text_layers: int | None = None,
    num_fusion_layers: int | None = None,
    image_size: int | None = None,
    decoder_from_text: bool = False,
    decoder_config: dict | None = None,
    pooling_mode: str | None = None,
    output_loading_info: bool = False,
    **fields,
):
    """
    Make a TRIPS model from a vision tower and a text encoder. New weights are logged as a warning.

    Args:
        model_class (`type`): [`TripsModel`] or a model with a head.
        vision (`str` or `PreTrainedModel`): ViT, DeiT, CLIP or DINOv2: Hub repository, folder, or model. DeiT's
            distillation token is dropped, which changes its states slightly. DINOv2's LayerScale becomes part of the
            projections before it; registers and SwiGLU are not supported.
        text (`str` or `PreTrainedModel`): BERT, MiniLM or RoBERTa: Hub repository, folder, or model. RoBERTa needs
            padding on the right.
        num_text_layers (`int`, *optional*): Number of lower layers that become the text encoder. Default: half of 12
            or more layers, all of fewer.
        num_fusion_layers (`int`, *optional*): Number of fusion layers. They start from the next layers of the text
            encoder; further layers and all cross-attention are new. Default: all next layers, or 6 without any.
        image_size (`int`, *optional*): New resolution, for which positions are interpolated.
        decoder_from_text (`bool`, *optional*, defaults to `False`): Start the decoder of a generative head from the
            text encoder's embeddings and upper layers.
        decoder_config (`dict`, *optional*): Fields of the decoder. `bos_token_id` and `eos_token_id` must be the
            tokenizer's. Default: those of the text encoder's configuration, or BERT's 101 and 102.
        pooling_mode (`str`, *optional*): `"cls"` or `"mean"`, see [`TripsTextConfig`]. Default: `"mean"` for a model
            of Sentence Transformers that has it, else `"cls"`.
        output_loading_info (`bool`, *optional*, defaults to `False`): Also return the report.
        fields: Other fields of [`TripsConfig`], such as `schedule`.

    Returns:
        The model in evaluation mode, or `(model, ConversionReport)`.

    Raises:
        TypeError: `model_class` is a part of a model.
        ConversionError: A model is not supported, or its weights are not as expected.
    """
    if model_class.config_class is not TripsConfig:
        raise TypeError(f"{model_class.__name__} is a part of a model. Load it with `from_pretrained`.")
    config = vision_text_config(
        vision,
        text,
        num_text_layers=num_text_layers,
        num_fusion_layers=num_fusion_layers,
        image_size=image_size,
        decoder_config=decoder_config,
        pooling_mode=pooling_mode,
        **fields,
    )
    model, report = make_vision_text_model(model_class, config, vision, text, decoder_from_text)
    return (model, report) if output_loading_info else model


def vision_text_config(
    vision: str | os.PathLike | PreTrainedModel,
    text: str | os.PathLike | PreTrainedModel,
    num_text_layers: int | None = None,
    num_fusion_layers: int | None = None,
    image_size: int | None = None,
    decoder_config: dict | None = None,
    pooling_mode: str | None = None,
    **fields,
) -> TripsConfig:
    """Return the configuration of the model that [`from_vision_text_pretrained`] makes, without loading weights."""
    if pooling_mode is None:
        pooling_mode = "cls" if isinstance(text, PreTrainedModel) else _stated_pooling_mode(text)
    vision = _config_of(vision)
    text = _config_of(text)
    _check_type(vision, "vision", VISION_TYPES)
    _check_type(text, "text", TEXT_TYPES)
    vision = vision.vision_config if vision.model_type == "clip" else vision
    num_layers = text.num_hidden_layers
    if num_text_layers is None:
        num_text_layers = num_layers // 2 if num_layers >= 12 else num_layers
    if not 1 <= num_text_layers <= num_layers:
        raise ConversionError(f"`num_text_layers` must be in 1..{num_layers}, got {num_text_layers}.")
    if num_fusion_layers is None:
        num_fusion_layers = num_layers - num_text_layers or 6
    vision_fields = _vision_fields(vision)
    if image_size is not None:
        vision_fields["image_size"] = image_size
    ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id")}
    decoder_fields = {name: value for name, value in ids.items() if value is not None}
    return TripsConfig(
        vision_config=vision_fields,
        text_config=_text_fields(text) | {"num_hidden_layers": num_text_layers, "pooling_mode": pooling_mode},
        fusion_encoder_config={"num_hidden_layers": num_fusion_layers},
        decoder_config=decoder_fields | (decoder_config or {}),
        **fields,
    )


def make_vision_text_model(
    model_class: type[PreTrainedModel],
    config: TripsConfig,
    vision: str | os.PathLike | PreTrainedModel,
    text: str | os.PathLike | PreTrainedModel,
    decoder_from_text: bool = False,
) -> tuple[PreTrainedModel, ConversionReport]:
    """Make a model of [`vision_text_config`] with the weights of these models, as [`from_vision_text_pretrained`]."""
    vision_tower = _load(vision, "vision", VISION_TYPES)
    text_tower = _load(text, "text", TEXT_TYPES)
    plan = _plan(model_class, vision_tower.config, text_tower.config, config, decoder_from_text)
    source = {f"vision.{key}": weight for key, weight in vision_tower.weights.items()}
    source |= {f"text.{key}": weight for key, weight in text_tower.weights.items()}
    model = model_class(config)
    report = load_converted(model, source, plan)
    for part, tower in (("vision", vision_tower), ("text", text_tower)):
        for key in tower.keys_of_heads:
            report.left_out[f"{part}.{key}"] = f"heads of the {part} model"
    types = f"a {vision_tower.config.model_type} and a {text_tower.config.model_type}"
    logger.warning(f"{model_class.__name__} from {types}:\n{report}")
    return model.eval(), report


def _stated_pooling_mode(text: str | os.PathLike) -> str:
    """Return the pooling mode in the files of a model of Sentence Transformers, or `"cls"`, as in BERT."""
    causes = ("gated_repo", "missing_entries", "connection_errors")
    quiet = {f"_raise_exceptions_for_{cause}": False for cause in causes}
    if (path := cached_file(text, "1_Pooling/config.json", **quiet)) is None:
        return "cls"
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    found = [name for name in ("cls", "mean") if config.get("pooling_mode") == name]
    found += [name for name, key in SWITCHES.items() if config.get(f"pooling_mode_{key}")]
    if len(found) != 1:
        raise ConversionError(f"The pooling of `text` must be cls or mean, got {config}. Give `pooling_mode`.")
    return found[0]


def _config_of(source: str | os.PathLike | PreTrainedModel) -> PreTrainedConfig:
    return source.config if isinstance(source, PreTrainedModel) else AutoConfig.from_pretrained(source)


def _plan(
    model_class, vision: PreTrainedConfig, text: PreTrainedConfig, config: TripsConfig, decoder_from_text: bool
) -> ConversionPlan:
    left_out = {
        r"vision\.pooler\..*|text\.pooler\..*": "poolers",
        r"vision\.embeddings\.distillation_token": "the distillation token",
        r"vision\.embeddings\.mask_token": "the mask token of DINOv2's training",
        r"vision\..*\.layer_scale[12]\.lambda1": "LayerScale, part of the projections before it",
        r"vision\.(text_model|text_projection|visual_projection|logit_scale)\b.*": "parts of CLIP outside its tower",
    }
    num_used = config.text_config.num_hidden_layers + config.fusion_encoder_config.num_hidden_layers
    for number in range(num_used, text.num_hidden_layers):
        left_out[rf"text\.encoder\.layer\.{number}\..*"] = "unused upper layers"
    return ConversionPlan(
        model_class=model_class,
        config=config,
        rules=_vision_rules(vision, config) + _text_rules(text, config, decoder_from_text),
        left_out=left_out,
        new=(rf"{VISION}\.selection_projection\..*", rf"(?!{VISION}\.|{TEXT}\.).*"),
    )


def _load(source: str | os.PathLike | PreTrainedModel, part: str, model_types: tuple[str, ...]) -> Tower:
    config = _config_of(source)
    _check_type(config, part, model_types)
    missing = []
    keys_of_heads = []
    if not isinstance(source, PreTrainedModel):
        source, loaded = AutoModel.from_pretrained(source, use_safetensors=True, output_loading_info=True)
        missing = loaded["missing_keys"]
        keys_of_heads = loaded["unexpected_keys"]
    weights = {key: value for key, value in source.base_model.state_dict().items() if key not in missing}
    if config.model_type == "clip":
        weights = {key.removeprefix("vision_model."): value for key, value in weights.items()}
        config = config.vision_config
    if config.model_type == "dinov2":
        weights = _with_layer_scale_folded(weights)
    return Tower(config, weights, sorted(keys_of_heads))


def _check_type(config: PreTrainedConfig, part: str, model_types: tuple[str, ...]):
    """Raise a [`ConversionError`] if a model of this configuration is not supported as that part."""
    if config.model_type not in model_types:
        raise ConversionError(f"`{part}` must be a model of type {', '.join(model_types)}, got {config.model_type!r}.")
    if getattr(config, "use_swiglu_ffn", False):
        raise ConversionError(f"`{part}` is a DINOv2 with SwiGLU, which is not supported. Use a smaller one.")


def _with_layer_scale_folded(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Fold DINOv2's LayerScale, which multiplies the outputs of attention and MLP by a vector each, into the projections
    before it.
    """
    folded = dict(weights)
    for key, scale in weights.items():
        match = re.fullmatch(r"(.*\.)layer_scale([12])\.lambda1", key)
        if match is None:
            continue
        projection = match[1] + {"1": "attention.o_proj", "2": "mlp.fc2"}[match[2]]
        factors = {f"{projection}.weight": scale[:, None], f"{projection}.bias": scale}
        for target, factor in factors.items():
            if target in weights:  # `convert_weights` reports missing ones
                folded[target] = weights[target] * factor
    return folded


def _vision_fields(config: PreTrainedConfig) -> dict:
    fields = fields_of(config, VISION_FIELDS)
    if config.model_type == "dinov2":
        return fields | {"intermediate_size": int(config.hidden_size * config.mlp_ratio)}
    if config.model_type != "clip_vision_model":
        return fields
    return fields | {
        "attention_probs_dropout_prob": config.attention_dropout,
        "patch_bias": False,
        "use_pre_layernorm": True,
    }


def _text_fields(config: PreTrainedConfig) -> dict:
    fields = fields_of(config, TEXT_FIELDS)
    return fields | {"max_position_embeddings": fields["max_position_embeddings"] - _unused_positions(config)}


def _unused_positions(config: PreTrainedConfig) -> int:
    """Return the number of unused rows: RoBERTa's positions start after the padding token's id."""
    return config.pad_token_id + 1 if config.model_type in ROBERTA_TYPES else 0


def _vision_rules(source: PreTrainedConfig, config: TripsConfig) -> tuple[Rule, ...]:
    grid = TripsVisionConfig(image_size=source.image_size, patch_size=source.patch_size).grid_size
    resample = resampled(grid, config.vision_config.grid_size)
    if source.model_type == "clip_vision_model":
        return _clip_rules(resample)
    if source.model_type == "dinov2":
        return _dinov2_rules(resample)

    def positions(table: torch.Tensor) -> torch.Tensor:
        if source.model_type == "deit":  # the position of its distillation token follows that of [CLS]
            table = torch.cat((table[:, :1], table[:, 2:]), dim=1)
        return resample(table)

    return (
        Rule(rf"{VISION}\.embeddings\.position_embeddings", "vision.embeddings.position_embeddings", positions),
        Rule(rf"{VISION}\.(embeddings\.(?:cls_token|patch_embeddings\..*)|layers\..*|layernorm\..*)", r"vision.\1"),
    )


def _clip_rules(resample: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Rule, ...]:
    embeddings = rf"{VISION}\.embeddings\."
    layer = rf"{VISION}\.layers\.(\d+)\."
    source = r"vision.encoder.layers.\1."
    positions = "vision.embeddings.position_embedding.weight"
    return (
        Rule(embeddings + "cls_token", "vision.embeddings.class_embedding", lambda token: token[None, None]),
        Rule(embeddings + "position_embeddings", positions, lambda table: resample(table[None])),
        Rule(embeddings + r"patch_embeddings\.projection\.(.*)", r"vision.embeddings.patch_embedding.\1"),
        Rule(rf"{VISION}\.pre_layernorm\.(.*)", r"vision.pre_layrnorm.\1"),
        Rule(rf"{VISION}\.layernorm\.(.*)", r"vision.post_layernorm.\1"),
        Rule(layer + r"layernorm_before\.(.*)", source + r"layer_norm1.\2"),
        Rule(layer + r"layernorm_after\.(.*)", source + r"layer_norm2.\2"),
        Rule(layer + r"attention\.o_proj\.(.*)", source + r"self_attn.out_proj.\2"),
        Rule(layer + r"attention\.(.*)", source + r"self_attn.\2"),
        Rule(layer + r"mlp\.(.*)", source + r"mlp.\2"),
    )


def _dinov2_rules(resample: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Rule, ...]:
    layer = rf"{VISION}\.layers\.(\d+)\."
    source = r"vision.encoder.layer.\1."
    return (
        Rule(rf"{VISION}\.embeddings\.position_embeddings", "vision.embeddings.position_embeddings", resample),
        Rule(rf"{VISION}\.(embeddings\.(?:cls_token|patch_embeddings\..*)|layernorm\..*)", r"vision.\1"),
        Rule(layer + r"layernorm_before\.(.*)", source + r"norm1.\2"),
        Rule(layer + r"layernorm_after\.(.*)", source + r"norm2.\2"),
        Rule(layer + r"((?:attention|mlp)\..*)", source + r"\2"),
    )


def _text_rules(source: PreTrainedConfig, config: TripsConfig, decoder_from_text: bool) -> tuple[Rule, ...]:
    num_text_layers = config.text_config.num_hidden_layers
    num_layers = source.num_hidden_layers
    rules = _embedding_rules(TEXT, source)
    rules += (bert_layers(TEXT, "text"), *_upper_layers(FUSION, num_text_layers, num_layers))
    if decoder_from_text:
        first_layer = max(num_layers - config.decoder_config.num_hidden_layers, 0)
        rules += _embedding_rules("decoder", source)
        rules += _upper_layers("decoder", first_layer, num_layers)
        rules += (Rule(r"lm_head\.decoder\.weight", "text.embeddings.word_embeddings.weight"),)
    return rules


def _embedding_rules(target: str, source: PreTrainedConfig) -> tuple[Rule, ...]:
    first = _unused_positions(source)
    table = "text.embeddings.position_embeddings.weight"
    return (
        Rule(rf"{target}\.embeddings\.position_embeddings\.weight", table, lambda positions: positions[first:]),
        Rule(rf"{target}\.embeddings\.(.*)", r"text.embeddings.\1"),
    )


def _upper_layers(target: str, first_layer: int, num_layers: int) -> tuple[Rule, ...]:
    """Return rules that map the layers from `first_layer` on, without cross-attention, to the first of `target`."""
    return tuple(
        Rule(
            rf"{target}\.encoder\.layer\.{number - first_layer}\.((?:attention|intermediate|output)\..*)",
            rf"text.encoder.layer.{number}.\1",
        )
        for number in range(first_layer, num_layers)
    )
