"""Conversion of published checkpoints with their processors: files of ALBEF, names or folders of BLIP and ViLT."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoImageProcessor, BlipForQuestionAnswering, PreTrainedConfig, PreTrainedModel
from transformers.models.vilt import modeling_vilt

from ..modeling_trips import TripsForQuestionAnswering
from ..modeling_trips_vision import TripsPreTrainedModel
from ..processing_trips import TripsProcessor
from .albef import albef_plan
from .blip import blip_plan
from .files import WEIGHT_FILES, read_weights
from .processors import load_albef_tokenizer, load_tokenizer, make_processor
from .rules import ConversionError, ConversionPlan, ConversionReport, make_converted
from .vilt import vilt_plan


# Weights of another model with their conversion plan and processor
Source = tuple[dict[str, torch.Tensor], ConversionPlan, TripsProcessor]


def convert_published(checkpoint: str, **options) -> tuple[TripsPreTrainedModel, TripsProcessor, ConversionReport]:
    """
    Convert a published checkpoint. Return the model, its processor and a report.

    Args:
        checkpoint (`str`): File of ALBEF, or Hub repository or folder of a BLIP or ViLT.
        options:
            - **tokenizer** (`str`, *optional*): Name or folder of a tokenizer. Default: bert-base-uncased for ALBEF,
              the checkpoint's own for the others.
            - **image_size** (`int`, *optional*): New resolution, for which positions are interpolated.
            - **task**, **num_attention_heads**: As in [`albef_plan`], only for ALBEF.
            - Fields of [`TripsConfig`] that set the selection.

    Raises:
        ConversionError: The checkpoint is unknown or damaged, or its weights do not fit.
        ValueError: An option or the tokenizer does not suit the checkpoint.
    """
    try:
        model_type = None  # a file
        if not Path(checkpoint).is_file():
            model_type = PreTrainedConfig.get_config_dict(checkpoint)[0].get("model_type")
        if model_type not in READERS:
            raise ConversionError(
                f"{checkpoint} is of type {model_type!r}, which is not supported. Give a file of ALBEF "
                f"({', '.join(WEIGHT_FILES)}) or a model of type blip or vilt."
            )
        given = [name for name in ("task", "num_attention_heads") if name in options]
        if given and model_type is not None:
            raise ValueError(f"`{'`, `'.join(given)}` is only supported for ALBEF. Leave it out.")
        weights, plan, processor = READERS[model_type](checkpoint, **options)
        num_tokens = len(processor.tokenizer)
        vocab_size = plan.config.text_config.vocab_size
        if num_tokens != vocab_size:
            raise ConversionError(
                f"The tokenizer has {num_tokens} tokens, but the checkpoint has {vocab_size}. Give the checkpoint's "
                "tokenizer as `tokenizer`."
            )
        model, report = make_converted(weights, plan)
        return model, processor, report
    except ConversionError as error:
        if str(checkpoint) in str(error):
            raise
        raise ConversionError(f"{checkpoint}: {error}") from error


def _read_albef(
    checkpoint: str,
    task: str | None = None,
    tokenizer: str | None = None,
    image_size: int | None = None,
    num_attention_heads: int | None = None,
    **selection,
) -> Source:
    weights = read_weights(checkpoint)
    own_tokenizer = load_albef_tokenizer(tokenizer or "bert-base-uncased")
    plan = albef_plan(
        weights,
        task=task,
        image_size=image_size,
        num_attention_heads=num_attention_heads,
        pad_token_id=own_tokenizer.pad_token_id,
        bos_token_id=own_tokenizer.cls_token_id,
        eos_token_id=own_tokenizer.sep_token_id,
        **selection,
    )
    text_cleaning = "albef_question" if plan.model_class is TripsForQuestionAnswering else "albef_caption"
    return weights, plan, make_processor(own_tokenizer, plan.config, text_cleaning)


def _read_blip(checkpoint: str, tokenizer: str | None = None, image_size: int | None = None, **options) -> Source:
    config = AutoConfig.from_pretrained(checkpoint)
    if config.architectures != ["BlipForQuestionAnswering"]:
        raise ConversionError(
            f"{checkpoint} is a {config.architectures}, but only BlipForQuestionAnswering can be converted. Use "
            "`apply_patch_selection` on the BLIP model instead."
        )
    weights, unexpected = _load(BlipForQuestionAnswering, checkpoint)
    if unexpected:
        raise ConversionError(f"{checkpoint} has weights that are not BLIP's: {unexpected}.")
    own_tokenizer = load_tokenizer(tokenizer or checkpoint)
    plan = blip_plan(weights, config, image_size, **options)
    return weights, plan, make_processor(own_tokenizer, plan.config)


def _read_vilt(checkpoint: str, tokenizer: str | None = None, image_size: int | None = None, **options) -> Source:
    own_tokenizer = load_tokenizer(tokenizer or checkpoint)
    config = AutoConfig.from_pretrained(checkpoint, pad_token_id=own_tokenizer.pad_token_id)
    # Checkpoints name "ViltForPreTraining", which Transformers does not have.
    model_class = getattr(modeling_vilt, (config.architectures or ["ViltModel"])[0], modeling_vilt.ViltModel)
    weights, unexpected = _load(model_class, checkpoint)
    weights |= {key: torch.empty(0) for key in unexpected}  # an error unless the plan leaves them out
    ends = {"bos_token_id": own_tokenizer.cls_token_id, "eos_token_id": own_tokenizer.sep_token_id}
    plan = vilt_plan(weights, config, image_size=image_size, decoder_config=ends, **options)
    processor = make_processor(own_tokenizer, plan.config)
    own_image_processor = AutoImageProcessor.from_pretrained(checkpoint)
    processor.image_processor.image_mean = own_image_processor.image_mean
    processor.image_processor.image_std = own_image_processor.image_std
    return weights, plan, processor


READERS: dict[str | None, Callable[..., Source]] = {None: _read_albef, "blip": _read_blip, "vilt": _read_vilt}


def _load(model_class: type[PreTrainedModel], checkpoint: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the weights of a Transformers class in a checkpoint, and the checkpoint's unexpected keys."""
    model, loaded = model_class.from_pretrained(checkpoint, use_safetensors=True, output_loading_info=True)
    weights = {key: value for key, value in model.state_dict().items() if key not in loaded["missing_keys"]}
    return weights, sorted(loaded["unexpected_keys"])
