"""The schedule of a run: whether its scores can learn, the choice of the default one, and what it costs."""

import logging
import math
from collections import Counter

from datasets import Dataset

from modeling_trips import UNPRUNED, SelectionSchedule, TripsConfig, TripsProcessor, TripsVisionConfig
from modeling_trips.inspection.cost import forward_cost
from modeling_trips.inspection.diagnostics import scored_by_image
from trips_examples.data.images import column_of, image_keys
from trips_examples.training.recipe import MANY_TEXTS


logger = logging.getLogger(__name__)


def check_gate(config: TripsVisionConfig):
    """Raise a `ValueError` before the first step for a schedule whose scores the gate cannot teach."""
    schedule = config.schedule
    if config.selection_gate > 0 and schedule.layers and schedule.selections[-1].guidance == "random":
        raise ValueError(
            "--selection_gate needs a --schedule whose last layer is scored by the text or the image, got "
            f"{schedule}. Give --selection_gate 0."
        )


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
