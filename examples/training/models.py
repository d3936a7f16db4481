"""Initial model, processor and data of a run."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoImageProcessor, PreTrainedTokenizerBase, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME

from modeling_trips import (
    UNPRUNED,
    SelectionSchedule,
    TripsConfig,
    TripsPreTrainedModel,
    TripsProcessor,
    TripsVisionConfig,
)
from modeling_trips.conversion.processors import load_tokenizer, make_processor
from modeling_trips.conversion.vision_text import make_vision_text_model, vision_text_config
from modeling_trips.inspection.cost import forward_cost
from modeling_trips.inspection.diagnostics import scored_by_image
from trips_examples.data.images import column_of, image_size, without_decoding
from trips_examples.data.loading import load_task_dataset, with_fitting_texts
from trips_examples.data.tasks import TASKS
from trips_examples.data.vocabulary import train_tokenizer
from trips_examples.training.options import DataArguments, ModelArguments, config_fields
from trips_examples.training.phases import options_of_phases
from trips_examples.training.recipe import FEW, MANY_TEXTS


logger = logging.getLogger(__name__)


def load_data(task: str, args: DataArguments, training_args: TrainingArguments, patch_size: int = 1) -> DatasetDict:
    """
    Load the splits of a task (see `load_task_dataset`), truncated as requested, with encoded images for the collators.

    Raises:
        ValueError: There are bad rows, or a requested split does not exist.
    """
    if args.files:  # before they are read
        _check_splits(args.files, training_args)
    with training_args.main_process_first(desc="checking the data"):  # the others load its result
        data = load_task_dataset(task, args, patch_size, training_args.seed)
    _check_splits(data, training_args)
    for split, rows in data.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit is not None:
            rows = rows.select(range(min(limit, len(rows))))
        if split != "train" and "image_id" in rows.column_names:
            rows = sorted_by_image(rows)
        data[split] = without_decoding(rows)
    return DatasetDict(data)


def sorted_by_image(rows: Dataset) -> Dataset:
    """Sort rows by `image_id`, so that those of one image share its cached states. Rows without one are last."""
    image_ids = column_of(rows, "image_id")

    def place(row: int) -> tuple:
        return image_ids[row] is None, image_ids[row]

    return rows.select(sorted(range(len(rows)), key=place))  # `Dataset.sort` warns since pyarrow 25


def start_run(
    model_class: type[TripsPreTrainedModel],
    task: str,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    load: Callable[..., dict] | None = None,
    group_size: int | None = None,
    **task_fields,
) -> tuple[TripsPreTrainedModel, TripsProcessor, dict]:
    """
    Return the initial model, the processor and the splits of a task, after checking the options, the data and the
    texts, in this order. The log says what the model starts from, and what its schedule costs.

    Args:
        load (`Callable`, *optional*): Function of data and training arguments, configuration and processor that
            returns the splits. Those that are no `Dataset` are not checked. Default: `load_data`.
        group_size (`int`, *optional*): Texts of an image that share a computation. Default: `texts_per_image`.
        task_fields: Fields of `TripsConfig` that the task sets.
    """
    config, processor = load_start(model_args, data_args.scene_size, **task_fields)
    if load is None:
        data = load_data(task, data_args, training_args, config.vision_config.patch_shape[0])
    else:
        data = load(data_args, training_args, config, processor)
    loaded = DatasetDict({split: rows for split, rows in data.items() if isinstance(rows, Dataset)})
    if processor is None:
        processor = train_processor(config, data_args.vocabulary(loaded, *TASKS[task].texts))
    rows = loaded.get("train", loaded.get("validation"))
    sizes = [] if rows is None else some_image_sizes(rows)
    if sizes and model_args.image_size is None and model_args.max_image_size is not None:
        fit_image_size(config, processor, sizes, model_args.max_image_size)
    fitting = with_fitting_texts(loaded, task, processor, skip=data_args.skip_bad_rows)
    if rows is not None:
        group_size = group_size or training_args.texts_per_image
        texts_per_image, texts_in_batch, text_length = texts_of_images(rows, TASKS[task].text, group_size, processor)
        if model_args.schedule == FEW and "schedule" not in training_args.typed:
            choose_schedule(config, texts_per_image, text_length)
        log_costs(config, texts_per_image, texts_in_batch, text_length)
    if training_args.do_train and training_args.resume_from_checkpoint is not None:
        check_resumed(config, training_args)
    model = make_model(model_class, model_args, config, processor)
    log_start(model, processor, model_args.start, sizes, training_args)
    return model, processor, {**data, **fitting}


def log_start(
    model: TripsPreTrainedModel,
    processor: TripsProcessor,
    start: str,
    sizes: list[tuple[int, int]],
    args: TrainingArguments,
):
    """Log the initial weights, the median (height, width) of the images in pixels, and what decides a step."""
    resized = processor.image_processor.size
    images = f"images to {resized['width']}x{resized['height']}"
    if sizes:
        median_height = median(size[0] for size in sizes)
        median_width = median(size[1] for size in sizes)
        images = f"images {median_width:g}x{median_height:g} to {resized['width']}x{resized['height']}"
    logger.info("Start: %s, %.1f million parameters; %s", start, model.num_parameters() / 1e6, images)
    logger.info(
        "Steps of %d texts per process, up to %d of an image; learning rate %g (towers: %s); %s",
        args.per_device_train_batch_size,
        args.texts_per_image,
        args.learning_rate,
        args.tower_learning_rate or "the same",
        args.precision,
    )


def _check_splits(splits: Container[str], args: TrainingArguments):
    for split, option in (("train", "do_train"), ("validation", "do_eval")):
        if getattr(args, option) and split not in splits:
            raise ValueError(f"There is no {split} split. Give --{split}_file or --{option} False.")


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
    args.check_start()
    fields = {**config_fields(args), **task_fields}
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
    check_gate(config.vision_config)
    return config, processor


def check_gate(config: TripsVisionConfig):
    """Raise a `ValueError` before the first step for a schedule whose scores the gate cannot teach."""
    schedule = config.schedule
    if config.selection_gate > 0 and schedule.layers and schedule.selections[-1].guidance == "random":
        raise ValueError(
            "--selection_gate needs a --schedule whose last layer is scored by the text or the image, got "
            f"{schedule}. Give --selection_gate 0."
        )


def check_resumed(config: TripsConfig, args: TrainingArguments):
    """
    Compare the selection and the length of a resumed run with those of its checkpoint. Other values that the command
    line gives are a warning; other defaults, as of another version, are a `ValueError`.
    """
    folder = Path(args.resume_from_checkpoint)
    state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    values: dict[str, tuple[Any, Any]] = {}  # of the checkpoint and of this run
    if (folder / "config.json").exists():  # FSDP writes none
        stored = TripsConfig.from_pretrained(folder)
        values["schedule"] = (str(stored.vision_config.schedule), str(config.vision_config.schedule))
        for name in ("selection_gate", "selection_loss_weight"):
            values[name] = (getattr(stored, name), getattr(config, name))
    for entry in state.log_history:
        if "unpruned_share" in entry:  # by `PhasesCallback`; the last one counts
            for name, value in options_of_phases(args).items():
                values[name] = (entry.get(name, value), value)
    has_same_epochs = args.max_steps <= 0 and state.num_train_epochs == math.ceil(args.num_train_epochs)
    if not has_same_epochs:
        values["max_steps"] = (state.max_steps, args.max_steps)
    typed = args.typed | ({"max_steps"} if "num_train_epochs" in args.typed else set())
    changed = [name for name, (before, now) in values.items() if before != now]
    before = " ".join(f"--{name} {values[name][0]}" for name in changed)
    now = " ".join(f"--{name} {values[name][1]}" for name in changed)
    message = f"{folder} was trained with {before}, and this run has {now}."
    if not typed.issuperset(changed):
        raise ValueError(f"{message} Give {before} to go on as it began, or the values that you want.")
    if changed and args.should_log:
        logger.warning(message)


def _start_from_checkpoint(args: ModelArguments, fields: dict) -> tuple[TripsConfig, TripsProcessor]:
    config = TripsConfig.from_pretrained(args.model, **fields)
    processor = TripsProcessor.from_pretrained(args.model)
    side = args.image_size or args.max_image_size
    if side is not None:
        set_image_size(processor, side)
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
    tokenizer = _tokenizer(args.tokenizer or text)
    _set_ends(config, tokenizer)
    processor = make_processor(tokenizer, config)
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
    tokenizer = _tokenizer(args.tokenizer)
    _set_vocabulary(config, tokenizer)
    return config, make_processor(tokenizer, config)


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
    patch_size = processor.patch_size
    longer_side = median(max(size) for size in sizes)
    num_patches = max(1, round(longer_side / patch_size))
    side = min(largest, num_patches * patch_size)
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


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(name)
    for token in ("pad_token", "cls_token", "sep_token"):
        if getattr(tokenizer, token) is None:
            raise ValueError(f"--tokenizer {name} has no `{token}`. Use a BERT-like tokenizer.")
    return tokenizer


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


# ---------------------------------------------------------------------------------------------------------------------
# The schedule


def choose_schedule(config: TripsConfig, texts_per_image: float, text_length: int):
    """
    Let the image choose the patches if the texts of an image, of which the data have `texts_per_image`, would take
    more operations by choosing their own. Log the operations of both.
    """
    by_text = config.vision_config.schedule
    by_image = SelectionSchedule.parse(MANY_TEXTS)
    macs = {}
    for schedule in (UNPRUNED, by_text, by_image):
        macs[schedule] = forward_cost(config, text_length, schedule).macs(texts_per_image)
    chosen = min(by_text, by_image, key=macs.get)
    logger.info(
        "With %.1f texts per image, %s takes %.2f times the operations of the unpruned model, %s %.2f times: %s",
        texts_per_image,
        by_text,
        macs[by_text] / macs[UNPRUNED],
        by_image,
        macs[by_image] / macs[UNPRUNED],
        chosen,
    )
    config.vision_config.schedule = chosen


def log_costs(config: TripsConfig, texts_per_image: float, texts_in_batch: float, text_length: int):
    """
    Log what the schedule costs with texts of `text_length` tokens, of which an image has `texts_per_image` in the data
    and `texts_in_batch` share a batch. Warn if it takes clearly more operations than the unpruned model, and name a
    cheaper one: scores of the text in an early layer make the layers behind it compute each image once per text.
    """
    schedule = config.vision_config.schedule
    if not schedule.layers:
        return
    unpruned = forward_cost(config, text_length, UNPRUNED)
    pruned = forward_cost(config, text_length, schedule)
    num_kept, num_patches = count_kept(config)
    logger.info(
        "%s keeps %d of %d patches, for %.2f times the operations of the unpruned model with one text per image, %.2f "
        "times with %.1f in a batch (an image of the data has %.1f)",
        schedule,
        num_kept,
        num_patches,
        pruned.macs(1) / unpruned.macs(1),
        pruned.macs(texts_in_batch) / unpruned.macs(texts_in_batch),
        texts_in_batch,
        texts_per_image,
    )
    if pruned.macs(texts_in_batch) > 1.1 * unpruned.macs(texts_in_batch):
        by_image = scored_by_image(schedule)
        cheaper = forward_cost(config, text_length, by_image).macs(texts_in_batch) / unpruned.macs(texts_in_batch)
        logger.warning("That is more than without pruning. --schedule %s: %.2f times.", by_image, cheaper)


def count_kept(config: TripsConfig) -> tuple[int, int]:
    """Return the number of patches that the last selection layer keeps, and that of all patches."""
    vision = config.vision_config
    num_patches = math.prod(vision.grid_size)
    if not vision.schedule.layers:
        return num_patches, num_patches
    num_tokens = forward_cost(config, text_length=1, schedule=vision.schedule).tokens[-1]
    return num_tokens - 1 - vision.fuse_inattentive_tokens, num_patches


def image_keys(rows: Dataset) -> list[Hashable]:
    """Return the image or the images of each row: rows with the same key share a computation."""
    if "image_id" in rows.column_names:
        return column_of(rows, "image_id")
    return [tuple(ids) for ids in column_of(rows, "image_ids")]


def texts_of_images(
    rows: Dataset, column: str, group_size: int, processor: TripsProcessor
) -> tuple[float, float, int]:
    """
    Return the mean number of texts of an image, the mean number of those that share it in a batch, if `group_size`
    may, and the most tokens of the first texts, which are in `column`.
    """
    counts = Counter(image_keys(rows)).values()
    num_groups = sum(math.ceil(count / group_size) for count in counts)
    some_rows = rows.select(range(min(256, len(rows))))
    texts = column_of(some_rows, column)
    token_ids = processor.tokenizer(processor.clean_texts(texts))["input_ids"]
    text_length = max(len(ids) for ids in token_ids)
    texts_per_image = len(rows) / len(counts)
    texts_in_batch = len(rows) / num_groups
    return texts_per_image, texts_in_batch, text_length


def some_image_sizes(rows: Dataset) -> list[tuple[int, int]]:
    """Return the upright (height, width) in pixels of the images of up to 256 rows, of pairs the first."""
    step = math.ceil(len(rows) / 256)
    sizes = []
    for row in rows.select(range(0, len(rows), step)):
        image = row["images"][0] if "images" in row else row["image"]
        sizes.append(image_size({"image": image}))
    return sizes


# ---------------------------------------------------------------------------------------------------------------------
# Weights


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


def set_image_size(processor: TripsProcessor, side: int):
    """Make a processor resize whole images to squares of this side."""
    if side < 1 or side % processor.patch_size:
        raise ValueError(f"--image_size {side} must be a multiple of the model's patch size, {processor.patch_size}.")
    size = {"height": side, "width": side}
    processor.image_processor.size = size
    if getattr(processor.image_processor, "do_center_crop", False):  # CLIP crops; use the whole image
        processor.image_processor.crop_size = dict(size)
