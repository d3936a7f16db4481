"""Start of a run: its data, processor and initial model, after checking what the user gave."""

import logging
from collections.abc import Callable, Container
from statistics import median

from datasets import Dataset, DatasetDict
from transformers import TrainingArguments

from modeling_trips import TripsPreTrainedModel, TripsProcessor
from trips_examples.data.images import column_of, some_image_sizes, without_decoding
from trips_examples.data.loading import load_task_dataset, with_fitting_texts
from trips_examples.data.tasks import TASKS
from trips_examples.training.models import fit_image_size, load_start, make_model, train_processor
from trips_examples.training.options import DataArguments, ModelArguments
from trips_examples.training.phases import check_phases
from trips_examples.training.recipe import FEW
from trips_examples.training.resuming import check_resumed
from trips_examples.training.schedules import as_seen, settle_schedule, texts_of_images


logger = logging.getLogger(__name__)


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
    check_phases(config, training_args)
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
        side = fit_image_size(processor, sizes, model_args.max_image_size)
        if model_args.model is None:  # a checkpoint interpolates its position embeddings
            config.vision_config.image_size = side
    fitting = with_fitting_texts(loaded, task, processor, skip=data_args.skip_bad_rows)
    if rows is not None:
        group_size = group_size or training_args.texts_per_image
        texts_per_image, texts_in_batch, text_length = texts_of_images(rows, TASKS[task].text, group_size, processor)
        is_default = model_args.schedule == FEW and "schedule" not in training_args.typed
        seen = as_seen(config, processor)
        settle_schedule(seen, texts_per_image, texts_in_batch, text_length, is_default)
        config.vision_config.schedule = seen.vision_config.schedule
    if training_args.do_train and training_args.resume_from_checkpoint is not None:
        check_resumed(config, processor, training_args)
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
    images = f"to {resized['width']}x{resized['height']}"
    if sizes:
        heights, widths = zip(*sizes)
        images = f"{median(widths):g}x{median(heights):g} {images}"
    logger.info("Start: %s, %.1f million parameters; images %s", start, model.num_parameters() / 1e6, images)
    logger.info(
        "Steps of %d texts per process, up to %d of an image; learning rate %g (towers: %s); %s",
        args.per_device_train_batch_size,
        args.texts_per_image,
        args.learning_rate,
        args.tower_learning_rate or "the same",
        args.precision,
    )


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
            image_ids = column_of(rows, "image_id")  # rows of one image share its cached states
            rows = rows.select(sorted(range(len(rows)), key=image_ids.__getitem__))  # `sort` warns since pyarrow 25
        data[split] = without_decoding(rows)
    return DatasetDict(data)


def _check_splits(splits: Container[str], args: TrainingArguments):
    for split, option in (("train", "do_train"), ("validation", "do_eval")):
        if getattr(args, option) and split not in splits:
            raise ValueError(f"There is no {split} split. Give --{split}_file or --{option} False.")
