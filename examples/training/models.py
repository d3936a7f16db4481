"""Initial model and processor of a run, and its schedule."""

import copy
import logging
import math
from collections import Counter
from collections.abc import Hashable, Iterable

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_trips import UNPRUNED, SelectionSchedule, TripsConfig, TripsPreTrainedModel, TripsProcessor
from modeling_trips.conversion.processors import make_processor
from modeling_trips.conversion.vision_text import make_vision_text_model, vision_text_config
from modeling_trips.inspection.cost import forward_cost
from trips_examples.data.images import column_of
from trips_examples.data.vocabulary import train_wordpiece_tokenizer
from trips_examples.training.options import ModelArguments


logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("question", "expression", "statement", "caption")
SCHEDULE_FIELDS = ("selection_layers", "keep_rate", "selection_guidance")


def load_start(
    args: ModelArguments, image_size: int | None = None, selects_late: bool = False, **config_fields
) -> tuple[TripsConfig, TripsProcessor | None]:
    """
    Check the options of the initial model before data are read.

    Args:
        args (`ModelArguments`): Options.
        image_size (`int`, *optional*): Side of the images of a model from scratch in pixels if `args` has none.
        selects_late (`bool`, *optional*, defaults to `False`): New models select by [`late_choice`] unless `args`
            names layers.
        config_fields: Fields of `TripsConfig` that the task sets.

    Returns:
        The configuration, and the processor; None for a model from scratch without `--tokenizer_name`, whose tokenizer
        [`train_processor`] trains.

    Raises:
        `ValueError`, `OSError`: The options do not fit, or the checkpoint or tokenizer does not exist.
    """
    fields, processor = {**args.config_overrides(), **config_fields}, None
    if selects_late and args.model_name_or_path is None and args.selection_layers is None:
        fields = {**late_choice(num_vision_layers(args)), **fields}
    if args.model_name_or_path is not None:
        config = TripsConfig.from_pretrained(args.model_name_or_path, **fields)
        processor = TripsProcessor.from_pretrained(args.model_name_or_path)
        if args.image_size is not None:
            set_image_size(processor, args.image_size)
    elif args.starts_from_parts:
        towers = args.vision_model_name_or_path, args.text_model_name_or_path
        config = vision_text_config(*towers, None, args.num_fusion_layers, args.image_size, **fields)
        tokenizer = _tokenizer(args.tokenizer_name or towers[1])
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
        if args.tokenizer_name is not None:
            tokenizer = _tokenizer(args.tokenizer_name)
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
    tokenizer = train_wordpiece_tokenizer(texts)
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
        rows (`Dataset`, *optional*): Training rows, for [`choose_schedule`]. Default: one text per image.
        group_size (`int`, *optional*, defaults to 1): Texts of an image that may share a batch.
    """
    choose_schedule(config, args, *_texts_of_images(rows, group_size, processor))
    attention = None if torch.accelerator.is_available() else "eager"  # faster on CPUs
    if args.model_name_or_path is not None:
        model, loading = model_class.from_pretrained(
            args.model_name_or_path,
            config=config,
            attn_implementation=attention,
            output_loading_info=True,
        )
        if has_new_decoder(model, loading["missing_keys"]) and start_decoder_from_text(model):
            logger.info("%s has no decoder. The decoder starts from the text encoder.", args.model_name_or_path)
    elif args.starts_from_parts:
        towers = args.vision_model_name_or_path, args.text_model_name_or_path
        model, _ = make_vision_text_model(model_class, config, *towers, decoder_from_text=True)
        if attention is not None:
            model.set_attn_implementation(attention)
    else:
        model = model_class._from_config(config, attn_implementation=attention)
    if args.freeze_vision_layers is not None:
        freeze_vision_layers(model, args.freeze_vision_layers)
    logger.info("%s parameters, %s", f"{model.num_parameters():,}", config.vision_config.schedule)
    return model


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(name)
    for token in ("pad_token", "cls_token", "sep_token"):
        if getattr(tokenizer, token) is None:
            raise ValueError(f"--tokenizer_name {name} has no `{token}`. Use a BERT-like tokenizer.")
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


def choose_schedule(config: TripsConfig, args: ModelArguments, texts_per_image: float, text_length: int):
    """
    Set the schedule of a new model, if no option does: the preset's, or else [`late_choice`], or else the preset's
    layers scored by the image: the first that costs no more MACs than the unpruned model. A schedule of the options or
    the checkpoint is kept; if it costs more, a warning names a cheaper one.

    Args:
        config (`TripsConfig`): Configuration of the initial model.
        args (`ModelArguments`): Options.
        texts_per_image (`float`), text_length (`int`): Texts that share an image in a batch, and their tokens.
    """
    own: dict = {}
    late, by_image = late_choice(config.vision_config.num_hidden_layers), {"selection_guidance": "image"}
    is_given = args.model_name_or_path is not None or any(getattr(args, name) is not None for name in SCHEDULE_FIELDS)

    def with_fields(fields: dict) -> SelectionSchedule:
        vision_config = copy.copy(config.vision_config)
        for name, value in fields.items():
            setattr(vision_config, name, value)
        return vision_config.schedule

    def ratio(fields: dict) -> float:
        return cost_ratio(config, with_fields(fields), texts_per_image, text_length)

    chosen = next(fields for fields in (own, late, by_image, {"keep_rate": 1.0}) if ratio(fields) <= 1)
    if not is_given:
        for name, value in chosen.items():
            setattr(config.vision_config, name, value)
    elif chosen:
        logger.warning(
            "The schedule %s takes %.2f times the operations of the unpruned model at %.1f texts per image. Cheaper, "
            "with %.2f: %s. More: docs/choose.md.",
            *(config.vision_config.schedule, ratio(own), texts_per_image, ratio(chosen)),
            " ".join(f"--{name} {_words(value)}" for name, value in chosen.items()),
        )


def _words(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


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


def late_choice(num_layers: int) -> dict:
    """
    Return the fields of `TripsConfig` for new models with many texts per image: patches are scored by the image in the
    paper's layers, at 5/12 and 10/12 of `num_layers` (from layer 3 on), and by the text only in the last layer, so
    further texts cost little in the tower.
    """
    places = (round(num_layers * part / 12) for part in (5, 10))
    by_image = [layer for layer in places if 3 <= layer < num_layers]
    return {
        "selection_layers": [*by_image, num_layers],
        "keep_rate": [0.7] * len(by_image) + [0.3],
        "selection_guidance": ["image"] * len(by_image) + ["text"],
    }


def num_vision_layers(args: ModelArguments) -> int:
    """Return the depth of a new model's vision tower."""
    if not args.starts_from_parts:
        return TripsConfig.from_preset(args.preset).vision_config.num_hidden_layers
    config = AutoConfig.from_pretrained(args.vision_model_name_or_path)
    config = getattr(config, "vision_config", config)  # CLIP's
    return getattr(config, "num_hidden_layers", 12)  # loading rejects models without it


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
