"""The model and the processor that a run starts with."""

import logging
from collections.abc import Iterable
from dataclasses import replace

from transformers import AutoTokenizer

from modeling_trips import TripsConfig, TripsPreTrainedModel, TripsProcessor
from modeling_trips.conversion.processors import make_processor
from trips_examples.data.vocabulary import train_wordpiece_tokenizer
from trips_examples.training.options import ModelArguments


logger = logging.getLogger(__name__)


def load_model(
    model_class: type[TripsPreTrainedModel],
    args: ModelArguments,
    texts: Iterable[str],
    image_size: int | None = None,
    **config_fields,
) -> tuple[TripsPreTrainedModel, TripsProcessor]:
    """
    A checkpoint and its processor, or a model from scratch with a tokenizer to go with it.

    Args:
        model_class (`type[TripsPreTrainedModel]`): the task's.
        args (`ModelArguments`)
        texts (`Iterable[str]`): what a tokenizer is trained on, if there is none. Not read otherwise.
        image_size (`int`, *optional*): side in pixels that images get where `args` has no other.
        config_fields: fields of `TripsConfig` that the task fixes.
    """
    if args.image_size is None:
        args = replace(args, image_size=image_size)
    if args.model_name_or_path is not None:
        model, processor = _load_checkpoint(model_class, args, config_fields)
    else:
        model, processor = _make_model(model_class, args, texts, config_fields)
    logger.info("%s parameters, %s", f"{model.num_parameters():,}", model.config.vision_config.selection_schedule)
    return model, processor


def _load_checkpoint(model_class, args: ModelArguments, config_fields: dict):
    model = model_class.from_pretrained(
        args.model_name_or_path,
        attn_implementation=args.attn_implementation,
        **args.config_overrides(),
        **config_fields,
    )
    processor = TripsProcessor.from_pretrained(args.model_name_or_path)
    if args.image_size is not None:
        side = {"height": args.image_size, "width": args.image_size}
        processor.image_processor.size = side
        if getattr(processor.image_processor, "do_center_crop", False):  # as CLIP's do: of the whole image, then
            processor.image_processor.crop_size = dict(side)
    return model, processor


def _make_model(model_class, args: ModelArguments, texts: Iterable[str], config_fields: dict):
    if args.tokenizer_name is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
    else:
        tokenizer = train_wordpiece_tokenizer(texts)
    for name in ("pad_token", "cls_token", "sep_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(
                f"--tokenizer_name {args.tokenizer_name}: it has no `{name}`. Take a BERT-like tokenizer."
            )
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    config = TripsConfig.from_preset(
        args.preset,
        text_config=vocabulary,
        decoder_config=ends,
        vision_config={} if args.image_size is None else {"image_size": args.image_size},
        **args.config_overrides(),
        **config_fields,
    )
    model = model_class._from_config(config, attn_implementation=args.attn_implementation)
    return model, make_processor(tokenizer, config)
