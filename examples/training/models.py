"""The initial model and processor of a run: a checkpoint, pretrained parts, or from scratch."""

import logging
from collections.abc import Iterable
from statistics import median

import torch
from transformers import AutoImageProcessor, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_trips import TripsConfig, TripsPreTrainedModel, TripsProcessor
from modeling_trips.conversion.processors import load_tokenizer, make_processor
from modeling_trips.conversion.vision_text import make_vision_text_model, vision_text_config
from trips_examples.data.vocabulary import train_tokenizer
from trips_examples.training.checks import check_names
from trips_examples.training.options import ModelArguments, config_fields


logger = logging.getLogger(__name__)


def load_start(
    args: ModelArguments, scene_size: int | None = None, **task_fields
) -> tuple[TripsConfig, TripsProcessor | None]:
    """
    Return the configuration and the processor of the initial model, before data are read. There is no processor for a
    model from scratch without `--tokenizer`, whose tokenizer [`train_processor`] trains. `scene_size` is the side of
    its images in pixels if `args` has none.

    Raises:
        `ValueError`, `OSError`: The options do not fit, or the checkpoint or tokenizer does not exist.
    """
    fields = {**config_fields(args), **task_fields}
    check_names(args)
    if args.model is not None:
        config, processor = _start_from_checkpoint(args, fields)
    elif args.starts_from_parts:
        config, processor = _start_from_towers(args, fields)
    else:
        config, processor = _start_from_scratch(args, scene_size, fields)
    num_layers = config.vision_config.num_hidden_layers
    config.vision_config.schedule.check_fits(num_layers)
    num_frozen = args.freeze_vision_layers or 0
    if not 0 <= num_frozen <= num_layers:
        raise ValueError(f"--freeze_vision_layers must be in 0..{num_layers} for this tower, got {num_frozen}.")
    return config, processor


def _start_from_checkpoint(args: ModelArguments, fields: dict) -> tuple[TripsConfig, TripsProcessor]:
    config = TripsConfig.from_pretrained(args.model, **fields)
    processor = TripsProcessor.from_pretrained(args.model)
    if args.image_size is not None:
        set_image_size(processor, args.image_size, "--image_size")
    elif args.max_image_size is not None:
        set_image_size(processor, args.max_image_size, "--max_image_size")
    return config, processor


def _start_from_towers(args: ModelArguments, fields: dict) -> tuple[TripsConfig, TripsProcessor]:
    vision = args.vision_model_name_or_path
    text = args.text_model_name_or_path
    config = vision_text_config(
        vision,
        text,
        num_fusion_layers=args.num_fusion_layers,
        image_size=args.image_size or args.max_image_size,
        **fields,
    )
    tokenizer = load_tokenizer(args.tokenizer or text)
    processor = make_processor(tokenizer, config)
    _set_ends(config, tokenizer)
    source = AutoImageProcessor.from_pretrained(vision)  # the tower's normalization of images
    processor.image_processor.image_mean = source.image_mean
    processor.image_processor.image_std = source.image_std
    return config, processor


def _start_from_scratch(
    args: ModelArguments, scene_size: int | None, fields: dict
) -> tuple[TripsConfig, TripsProcessor | None]:
    side = args.image_size or args.max_image_size or scene_size
    vision_fields = {} if side is None else {"image_size": side}
    config = TripsConfig.from_preset(args.preset or "tiny", vision_config=vision_fields, **fields)
    if args.tokenizer is None:
        return config, None
    tokenizer = load_tokenizer(args.tokenizer)
    processor = make_processor(tokenizer, config)
    _set_vocabulary(config, tokenizer)
    return config, processor


def train_processor(config: TripsConfig, texts: Iterable[str]) -> TripsProcessor:
    """Return a processor with a tokenizer trained on `texts`, whose vocabulary the configuration takes."""
    processor = make_processor(train_tokenizer(texts), config)
    _set_vocabulary(config, processor.tokenizer)
    return processor


def fit_image_size(processor: TripsProcessor, sizes: list[tuple[int, int]], largest: int) -> int:
    """
    Set the side of the images of a processor, and return it: the median of the longer sides of `sizes`, (height,
    width) in pixels, rounded to patches, or `largest` if that is less.
    """
    patch_size = processor.patch_size
    longer_side = median(max(size) for size in sizes)
    num_patches = max(1, round(longer_side / patch_size))
    side = min(largest, num_patches * patch_size)
    set_image_size(processor, side, "--max_image_size")
    return side


def make_model(
    model_class: type[TripsPreTrainedModel], args: ModelArguments, config: TripsConfig, processor: TripsProcessor
) -> TripsPreTrainedModel:
    """
    Make the initial model from what `load_start` returned: a checkpoint, a model from a vision tower and a text
    encoder, or a model from scratch.
    """
    attention = None if torch.accelerator.is_available() else "eager"  # faster on CPUs
    new: list[str] = []
    left_out: list[str] = []
    logging.disable(logging.WARNING)  # a line for each new or unused weight
    try:
        if args.model is not None:
            model, loading = model_class.from_pretrained(
                args.model, config=config, attn_implementation=attention, output_loading_info=True
            )
            new = loading["missing_keys"]
            left_out = loading["unexpected_keys"]
        elif args.starts_from_parts:
            model, report = make_vision_text_model(
                model_class,
                config,
                vision=args.vision_model_name_or_path,
                text=args.text_model_name_or_path,
                decoder_from_text=True,
            )
            new = report.new
            if attention is not None:
                model.set_attn_implementation(attention)
        else:
            model = model_class._from_config(config, attn_implementation=attention)
    finally:
        logging.disable(logging.NOTSET)
    for what, keys in (("new", new), ("left out", left_out)):
        parts = {key.removeprefix("model.").partition(".")[0] for key in keys}
        if parts:
            logger.info("Weights of %s, %s: %s", args.start, what, ", ".join(sorted(parts)))
    if args.model is not None and start_decoder_from_text(model, new):
        logger.info("The decoder starts from the text encoder.")
    if args.freeze_vision_layers is not None:
        tower = model.base_model.vision_model
        tower.embeddings.requires_grad_(False)
        if tower.config.use_pre_layernorm:
            tower.pre_layernorm.requires_grad_(False)
        for layer in tower.layers[: args.freeze_vision_layers]:
            layer.requires_grad_(False)
    return model


def _set_vocabulary(config: TripsConfig, tokenizer: PreTrainedTokenizerBase):
    for part in (config.text_config, config.fusion_encoder_config, config.decoder_config):
        part.vocab_size = len(tokenizer)
        part.pad_token_id = tokenizer.pad_token_id
    config.pad_token_id = tokenizer.pad_token_id
    _set_ends(config, tokenizer)


def _set_ends(config: TripsConfig, tokenizer: PreTrainedTokenizerBase):
    config.decoder_start_token_id = tokenizer.cls_token_id
    config.decoder_config.bos_token_id = tokenizer.cls_token_id
    config.decoder_config.eos_token_id = tokenizer.sep_token_id


@torch.no_grad()
def start_decoder_from_text(model: TripsPreTrainedModel, missing: Iterable[str]) -> bool:
    """
    Copy the embeddings and the upper layers of the text encoder to a decoder whose layers are all among the `missing`
    weights; its cross-attention stays new. Return False without one, if the sizes differ, if the text encoder has no
    layers (`fusion_type="single_stream"`), or under ZeRO-3.
    """
    new = {name for name, _ in model.named_parameters() if name.startswith("decoder.encoder.")}
    if not new or not new <= set(missing):
        return False
    text = model.base_model.text_model
    decoder = model.decoder
    if text.config.num_hidden_layers == 0 or is_deepspeed_zero3_enabled():
        return False
    for size in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings"):
        if getattr(text.config, size) != getattr(decoder.config, size):
            return False
    decoder.embeddings.load_state_dict(text.embeddings.state_dict())
    model.lm_head.decoder.weight.copy_(text.embeddings.word_embeddings.weight)
    layers = decoder.encoder.layer
    for layer, source in zip(layers, text.encoder.layer[-len(layers) :]):
        layer.load_state_dict(source.state_dict(), strict=False)
    return True


def set_image_size(processor: TripsProcessor, side: int, option: str):
    """Make a processor resize whole images to squares of this side, which an `option` gives."""
    if side < 1 or side % processor.patch_size:
        raise ValueError(f"{option} {side} must be a multiple of the model's patch size, {processor.patch_size}.")
    size = {"height": side, "width": side}
    processor.image_processor.size = size
    if getattr(processor.image_processor, "do_center_crop", False):  # CLIP crops; use the whole image
        processor.image_processor.crop_size = dict(size)
