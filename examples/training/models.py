"""Initial model and processor of a run, and its schedule."""

import logging
import math
from collections import Counter
from collections.abc import Hashable, Iterable

import torch
import transformers
from datasets import Dataset
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_trips import UNPRUNED, SelectionSchedule, TripsConfig, TripsPreTrainedModel, TripsProcessor
from modeling_trips.conversion.processors import make_processor
from modeling_trips.conversion.vision_text import make_vision_text_model, vision_text_config
from modeling_trips.inspection.cost import forward_cost
from trips_examples.data.images import column_of
from trips_examples.data.vocabulary import train_tokenizer
from trips_examples.training.options import ModelArguments


logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("question", "expression", "statement", "caption")


def load_start(
    args: ModelArguments, image_size: int | None = None, **config_fields
) -> tuple[TripsConfig, TripsProcessor | None]:
    """
    Check the options of the initial model before data are read.

    Args:
        args (`ModelArguments`): Options.
        image_size (`int`, *optional*): Side of the images of a model from scratch in pixels if `args` has none.
        config_fields: Fields of `TripsConfig` that the task sets.

    Returns:
        The configuration, and the processor; None for a model from scratch without `--tokenizer`, whose tokenizer
        [`train_processor`] trains.

    Raises:
        `ValueError`, `OSError`: The options do not fit, or the checkpoint or tokenizer does not exist.
    """
    fields, processor = {**args.config_overrides(), **config_fields}, None
    if args.model is not None:
        config = TripsConfig.from_pretrained(args.model, **fields)
        processor = TripsProcessor.from_pretrained(args.model)
        if args.image_size is not None:
            set_image_size(processor, args.image_size)
    elif args.starts_from_parts:
        towers = args.vision_model_name_or_path, args.text_model_name_or_path
        config = vision_text_config(*towers, None, args.num_fusion_layers, args.image_size, **fields)
        tokenizer = _tokenizer(args.tokenizer or towers[1])
        _set_ends(config, tokenizer)
        processor = make_processor(tokenizer, config)
        source = AutoImageProcessor.from_pretrained(towers[0])  # the tower's normalization of images
        for name in ("image_mean", "image_std"):
            setattr(processor.image_processor, name, getattr(source, name))
    else:
        side = args.image_size or image_size
        config = TripsConfig.from_preset(
            args.preset, vision_config={} if side is None else {"image_size": side}, **fields
        )
        if args.tokenizer is not None:
            tokenizer = _tokenizer(args.tokenizer)
            _set_vocabulary(config, tokenizer)
            processor = make_processor(tokenizer, config)
    most = config.vision_config.num_hidden_layers
    if args.freeze_vision_layers is not None and not 0 <= args.freeze_vision_layers <= most:
        raise ValueError(
            f"--freeze_vision_layers must be in 0..{most} for this vision tower, got {args.freeze_vision_layers}."
        )
    return config, processor


def train_processor(config: TripsConfig, texts: Iterable[str]) -> TripsProcessor:
    """Return a processor with a tokenizer trained on `texts`, whose vocabulary the configuration takes."""
    tokenizer = train_tokenizer(texts)
    _set_vocabulary(config, tokenizer)
    return make_processor(tokenizer, config)


def make_model(
    model_class: type[TripsPreTrainedModel],
    args: ModelArguments,
    config: TripsConfig,
    processor: TripsProcessor,
    rows: Dataset | None = None,
    group_size: int = 1,
) -> TripsPreTrainedModel:
    """
    Make the initial model from what `load_start` returned: a checkpoint, a model from a vision tower and a text
    encoder, or a model from scratch.

    Args:
        model_class (`type[TripsPreTrainedModel]`): Class of the task's model.
        args (`ModelArguments`), config (`TripsConfig`), processor (`TripsProcessor`): As in `load_start`.
        rows (`Dataset`, *optional*): Training rows, for the texts per image. Default: one text per image.
        group_size (`int`, *optional*, defaults to 1): Texts of an image that may share a batch.
    """
    warn_of_costs(config, *_texts_of_images(rows, group_size, processor))
    attention = None if torch.accelerator.is_available() else "eager"  # faster on CPUs
    if args.model is not None:
        model = _load_weights(model_class, args.model, config, attention)
    elif args.starts_from_parts:
        towers = args.vision_model_name_or_path, args.text_model_name_or_path
        model, _ = make_vision_text_model(model_class, config, *towers, decoder_from_text=True)
        if attention is not None:
            model.set_attn_implementation(attention)
    else:
        model = model_class._from_config(config, attn_implementation=attention)
    if args.freeze_vision_layers is not None:
        freeze_vision_layers(model, args.freeze_vision_layers)
    vision = config.vision_config
    numbers = (model.num_parameters(), vision.image_size, math.prod(vision.grid_size), vision.schedule)
    logger.info(
        "%d parameters; %s pixels per side, %d patches; selection %s, gate %g", *numbers, vision.selection_gate
    )
    return model


def _load_weights(
    model_class: type[TripsPreTrainedModel], name: str, config: TripsConfig, attention: str | None
) -> TripsPreTrainedModel:
    """Load a checkpoint of any task, and log which parts are new or left out."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # a line for each weight of another task's head
    try:
        model, loading = model_class.from_pretrained(
            name, config=config, attn_implementation=attention, output_loading_info=True
        )
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    parts = {
        kind: sorted({key.partition(".")[0] for key in loading[keys]})
        for kind, keys in (("new", "missing_keys"), ("left out", "unexpected_keys"))
    }
    if has_new_decoder(model, loading["missing_keys"]) and start_decoder_from_text(model):
        parts["started from the text encoder"] = ["decoder"]
    told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in parts.items() if names)
    if told:
        logger.info("Weights of %s: %s", name, told)
    return model


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(name)
    for token in ("pad_token", "cls_token", "sep_token"):
        if getattr(tokenizer, token) is None:
            raise ValueError(f"--tokenizer {name} has no `{token}`. Use a BERT-like tokenizer.")
    return tokenizer


def _set_vocabulary(config: TripsConfig, tokenizer: PreTrainedTokenizerBase):
    for part in (config.text_config, config.fusion_encoder_config, config.decoder_config):
        part.vocab_size, part.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    config.pad_token_id = tokenizer.pad_token_id
    _set_ends(config, tokenizer)


def _set_ends(config: TripsConfig, tokenizer: PreTrainedTokenizerBase):
    config.decoder_config.bos_token_id = config.decoder_start_token_id = tokenizer.cls_token_id
    config.decoder_config.eos_token_id = tokenizer.sep_token_id


# ---------------------------------------------------------------------------------------------------------------------
# The schedule


def warn_of_costs(config: TripsConfig, texts_per_image: float, text_length: int):
    """
    Warn if a schedule takes more operations than the unpruned model, and name a cheaper one: scores of the text in an
    early layer make the layers behind it compute each image once per text.

    Args:
        config (`TripsConfig`): Configuration of the initial model.
        texts_per_image (`float`), text_length (`int`): Texts that share an image in a batch, and their tokens.
    """
    schedule = config.vision_config.schedule
    by_image = SelectionSchedule(
        schedule.layers, tuple(selection._replace(guidance="image") for selection in schedule.selections)
    )
    own, cheaper = (cost_ratio(config, each, texts_per_image, text_length) for each in (schedule, by_image))
    if own > 1:
        logger.warning(
            "The schedule %s takes %.2f times the operations of the unpruned model at %.1f texts per image. Cheaper, "
            "with %.2f: --selection_guidance image. More: docs/choose.md.",
            *(schedule, own, texts_per_image, cheaper),
        )


def cost_ratio(config: TripsConfig, schedule: SelectionSchedule, texts_per_image: float, text_length: int) -> float:
    """Return the MAC ratio (pruned / unpruned) of text encoder, vision tower and fusion encoder."""
    pruned, unpruned = (forward_cost(config, text_length, each) for each in (schedule, UNPRUNED))
    return pruned.macs(texts_per_image) / unpruned.macs(texts_per_image)


def image_keys(rows: Dataset) -> list[Hashable]:
    """Return the image or the images of each row: rows with the same key share a computation."""
    if "image_id" in rows.column_names:
        return column_of(rows, "image_id")
    return [tuple(ids) for ids in column_of(rows, "image_ids")]


def _texts_of_images(rows: Dataset | None, group_size: int, processor: TripsProcessor) -> tuple[float, int]:
    """Return the mean number of texts that share an image in a batch, and the most tokens of the first texts."""
    if not rows:
        return 1.0, 16
    counts = Counter(image_keys(rows)).values()
    column = next(column for column in TEXT_COLUMNS if column in rows.column_names)
    texts = column_of(rows.select(range(min(256, len(rows)))), column)
    lengths = map(len, processor.tokenizer(processor.clean_texts(texts))["input_ids"])
    return sum(counts) / sum(math.ceil(count / group_size) for count in counts), max(lengths)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def has_new_decoder(model: TripsPreTrainedModel, missing: Iterable[str]) -> bool:
    """Return whether the layers of a model's decoder are all among the `missing` names."""
    layers = {name for name, _ in model.named_parameters() if name.startswith("decoder.encoder.")}
    return bool(layers) and layers <= set(missing)


@torch.no_grad()
def start_decoder_from_text(model: TripsPreTrainedModel) -> bool:
    """
    Copy the embeddings and the upper layers of the text encoder to the decoder, whose cross-attention stays new.
    Return False if the sizes differ, if the text encoder has no layers (`fusion_type="single_stream"`), or under
    ZeRO-3.
    """
    text, decoder = model.base_model.text_model, model.decoder
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
    agree = all(getattr(text.config, size) == getattr(decoder.config, size) for size in sizes)
    if not agree or text.config.num_hidden_layers == 0 or is_deepspeed_zero3_enabled():
        return False
    decoder.embeddings.load_state_dict(text.embeddings.state_dict())
    model.lm_head.decoder.weight.copy_(text.embeddings.word_embeddings.weight)
    layers = decoder.encoder.layer
    for layer, source in zip(layers, text.encoder.layer[-len(layers) :]):
        layer.load_state_dict(source.state_dict(), strict=False)
    return True


def freeze_vision_layers(model: TripsPreTrainedModel, num_layers: int):
    """
    Freeze the embeddings and the first `num_layers` layers of the vision tower. Layers before the first trained one
    need no backward pass.
    """
    tower = model.base_model.vision_model
    for part in (tower.embeddings, getattr(tower, "pre_layernorm", None), *tower.layers[:num_layers]):
        if part is not None:
            part.requires_grad_(False)


def set_image_size(processor: TripsProcessor, side: int):
    """Make a processor resize whole images to squares of this side."""
    if side < 1 or side % processor.patch_size:
        raise ValueError(f"--image_size {side} must be a multiple of the model's patch size, {processor.patch_size}.")
    size = {"height": side, "width": side}
    processor.image_processor.size = size
    if getattr(processor.image_processor, "do_center_crop", False):  # CLIP crops; use the whole image
        processor.image_processor.crop_size = dict(size)
