"""
Conversion of ALBEF's checkpoints: pre-trained, retrieval (Flickr30k, COCO, RefCOCO) and question answering.

ALBEF (https://arxiv.org/abs/2107.07651) is TRIPS without selection: timm's ViT, and a BERT whose upper layers have
cross-attention to the image between self-attention and feed-forward.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from ..modeling_trips import TripsForQuestionAnswering
from ..modeling_trips_pretraining import TripsForPreTraining, TripsForRetrieval
from .rules import (
    ConversionError,
    ConversionPlan,
    Rule,
    bert_layers,
    lm_head_rules,
    make_config,
    resampled,
    size_of,
    stacked_attention,
)


# Task of a checkpoint -> class of its TRIPS model. RefCOCO's has no box head, so it is a retrieval model.
ALBEF_TASKS = {
    "pretraining": TripsForPreTraining,
    "retrieval": TripsForRetrieval,
    "question-answering": TripsForQuestionAnswering,
}

NEVER_USED = {
    r"(visual_encoder|text_encoder|text_decoder|vision_proj|text_proj)_m\..*": "momentum copies",
    r"(image|text|idx)_queue|queue_ptr": "queues of the contrastive loss",
    r"(.*\.)?embeddings\.position_ids": "position numbers",
}

PATCHES = "visual_encoder.patch_embed.proj.weight"
POSITIONS = "visual_encoder.pos_embed"

# Layers of the vision tower; of the text encoder below its first cross-attention, with it, and of the decoder.
VISION_LAYERS = 12
TEXT_LAYERS = 6


class Head(NamedTuple):
    """Rules and sizes that a task adds to those of the towers."""

    rules: tuple[Rule, ...]
    left_out: dict[str, str]
    tied: bool = True
    projection_dim: int = 256
    new: tuple[str, ...] = ()


def detect_albef_task(keys: Iterable[str]) -> str:
    """
    Return the task of a checkpoint, one of `ALBEF_TASKS`.

    Raises:
        ConversionError: The checkpoint is of another task or model.
    """
    keys = list(keys)
    if any(key.startswith("cls_head.") for key in keys):
        raise ConversionError(
            "ALBEF's checkpoints for NLVR2 and visual entailment are not supported, because TRIPS has no counterpart "
            "of their classifier `cls_head`. Convert ALBEF's pre-trained checkpoint and fine-tune it instead."
        )
    signs = {"text_decoder.": "question-answering", "text_encoder.cls.": "pretraining", "vision_proj.": "retrieval"}
    for sign, task in signs.items():
        if any(key.startswith(sign) for key in keys):
            return task
    raise ConversionError(
        f"The file is not a checkpoint of ALBEF: no key begins with one of {', '.join(signs)}. Give a published file "
        f"for {', '.join(ALBEF_TASKS)}."
    )


def albef_plan(
    source: Mapping[str, torch.Tensor],
    task: str | None = None,
    image_size: int | None = None,
    num_attention_heads: int | None = None,
    pad_token_id: int = 0,
    bos_token_id: int = 101,
    eos_token_id: int = 102,
    **selection,
) -> ConversionPlan:
    """
    Plan the conversion of a checkpoint of ALBEF. Widths are read from the weights. The numbers of layers are
    ALBEF's, so a file with missing layers is not mistaken for a smaller model.

    Args:
        source (`dict[str, torch.Tensor]`): State dict of the checkpoint.
        task (`str`, *optional*): One of `ALBEF_TASKS`. Default: the task of the checkpoint. A pre-trained checkpoint
            also converts to `"retrieval"` and to `"question-answering"`, where the decoder starts from the fusion
            layers and the masked-language head, as in ALBEF's fine-tuning.
        image_size (`int`, *optional*): New resolution, for which positions are interpolated.
        num_attention_heads (`int`, *optional*): Attention heads of all parts, which the weights do not determine.
            Default: heads of width 64, as in ALBEF.
        pad_token_id, bos_token_id, eos_token_id (`int`): [PAD], [CLS] and [SEP] of the tokenizer.
        selection: Fields of [`TripsConfig`] that set the selection.

    Raises:
        ConversionError: The weights are not ALBEF's, have other layers, or their sizes cannot be read.
    """
    trained_for = detect_albef_task(source)
    task = task or trained_for
    if task not in ALBEF_TASKS:
        raise ConversionError(f"`task` must be one of {', '.join(ALBEF_TASKS)}, got {task!r}.")
    text = "text_encoder.bert" if any(key.startswith("text_encoder.bert.") for key in source) else "text_encoder"
    if task == "question-answering":
        head = _answering_head(source, trained_for, text)
    else:
        head = _retrieval_head(source, task, text)
    config = make_config(
        vision_config=_vision_fields(source, image_size, num_attention_heads) | {"num_hidden_layers": VISION_LAYERS},
        text_config=_text_fields(source, text, num_attention_heads)
        | {"num_hidden_layers": TEXT_LAYERS, "pad_token_id": pad_token_id},
        fusion_encoder_config={"num_hidden_layers": TEXT_LAYERS},
        decoder_config={
            "num_hidden_layers": TEXT_LAYERS,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
        },
        tie_word_embeddings=head.tied,
        projection_dim=head.projection_dim,
        answer_ranking="albef",
        **selection,
    )
    rules = (
        *_vision_rules(_grid(source), config.vision_config.grid_size),
        Rule(r"model\.text_model\.(.*)", rf"{text}.\1"),
        bert_layers(r"model\.fusion_model", text, first_layer=TEXT_LAYERS),
        *head.rules,
    )
    return ConversionPlan(
        model_class=ALBEF_TASKS[task],
        config=config,
        rules=rules,
        left_out=NEVER_USED | head.left_out,
        new=(r"model\.vision_model\.selection_projection\..*", *head.new),
    )


def _grid(source: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Return the (square) patch grid of the positions."""
    _, num_positions, _ = size_of(source, POSITIONS, 3)
    side = math.isqrt(num_positions - 1)
    if num_positions != 1 + side**2:
        raise ConversionError(
            f"{POSITIONS} must have one position for [CLS] and a square of them, got {num_positions}."
        )
    return side, side


def _num_heads(width: int, given: int | None) -> int:
    if given is not None:
        return given
    if width % 64:
        raise ConversionError(
            f"The number of attention heads is unknown, and width {width} is not divisible into heads of 64. Give "
            "`num_attention_heads`."
        )
    return width // 64


def _vision_fields(source, image_size: int | None, num_attention_heads: int | None) -> dict:
    hidden_size, num_channels, patch_size, _ = size_of(source, PATCHES, 4)
    intermediate_size, _ = size_of(source, "visual_encoder.blocks.0.mlp.fc1.weight", 2)
    return {
        "hidden_size": hidden_size,
        "num_attention_heads": _num_heads(hidden_size, num_attention_heads),
        "intermediate_size": intermediate_size,
        "image_size": image_size or _grid(source)[0] * patch_size,
        "patch_size": patch_size,
        "num_channels": num_channels,
        "layer_norm_eps": 1e-6,
    }


def _text_fields(source, text: str, num_attention_heads: int | None) -> dict:
    vocab_size, hidden_size = size_of(source, f"{text}.embeddings.word_embeddings.weight", 2)
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_attention_heads": _num_heads(hidden_size, num_attention_heads),
        "intermediate_size": size_of(source, f"{text}.encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_position_embeddings": size_of(source, f"{text}.embeddings.position_embeddings.weight", 2)[0],
        "type_vocab_size": size_of(source, f"{text}.embeddings.token_type_embeddings.weight", 2)[0],
        "layer_norm_eps": 1e-12,
    }


def _vision_rules(grid: tuple[int, int], new_grid: tuple[int, int]) -> tuple[Rule, ...]:
    embeddings = r"model\.vision_model\.embeddings\."
    layer = r"model\.vision_model\.layers\.(\d+)\."
    block = r"visual_encoder.blocks.\1."
    return (
        Rule(embeddings + "cls_token", "visual_encoder.cls_token"),
        Rule(embeddings + "position_embeddings", POSITIONS, resampled(grid, new_grid)),
        Rule(embeddings + r"patch_embeddings\.projection\.(.*)", r"visual_encoder.patch_embed.proj.\1"),
        Rule(layer + r"layernorm_before\.(.*)", block + r"norm1.\2"),
        *stacked_attention(layer, block + "attn.qkv"),
        Rule(layer + r"attention\.o_proj\.(.*)", block + r"attn.proj.\2"),
        Rule(layer + r"layernorm_after\.(.*)", block + r"norm2.\2"),
        Rule(layer + r"mlp\.(.*)", block + r"mlp.\2"),
        Rule(r"model\.vision_model\.layernorm\.(.*)", r"visual_encoder.norm.\1"),
    )


def _retrieval_head(source, task: str, text: str) -> Head:
    """Return projections, temperature and matching head; in pre-training also the language head and a new decoder."""
    projection_dim, _ = size_of(source, "vision_proj.weight", 2)
    rules = (
        Rule(r"(vision_proj|text_proj|itm_head)\.(.*)", r"\1.\2"),
        Rule(r"temp\.weight", "temp", lambda temperature: temperature.reshape(-1)),
    )
    if task == "retrieval":
        return Head(rules, {r"text_encoder\.cls\..*": "not part of this task"}, projection_dim=projection_dim)
    embeddings = f"{text}.embeddings.word_embeddings.weight"
    lm_rules, left_out, tied = lm_head_rules("mlm_score", "text_encoder.cls.predictions", embeddings, source)
    return Head(rules + lm_rules, left_out, tied, projection_dim, new=(r"(decoder|lm_head)\..*",))


def _answering_head(source, trained_for: str, text: str) -> Head:
    """Return the decoder, which starts from the fusion layers if the checkpoint has none."""
    if trained_for == "question-answering":
        decoder = "text_decoder.bert"
        predictions = "text_decoder.cls.predictions"
        rules: tuple[Rule, ...] = (Rule(r"decoder\.(.*)", rf"{decoder}.\1"),)
    else:
        decoder = text
        predictions = "text_encoder.cls.predictions"
        rules = (
            Rule(r"decoder\.embeddings\.(.*)", rf"{text}.embeddings.\1"),
            bert_layers("decoder", text, TEXT_LAYERS),
        )
    embeddings = f"{decoder}.embeddings.word_embeddings.weight"
    lm_rules, left_out, tied = lm_head_rules("lm_head", predictions, embeddings, source)
    left_out |= {r"(vision_proj|text_proj|itm_head)\..*|temp": "not part of this task"}
    return Head(rules + lm_rules, left_out, tied)
