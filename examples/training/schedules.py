"""The schedule of a run: what it costs, and the choice of the default one."""

import copy
import logging
import math
from collections import Counter

from datasets import Dataset

from modeling_trips import UNPRUNED, SelectionSchedule, TripsConfig, TripsProcessor
from modeling_trips.inspection.cost import forward_cost
from trips_examples.data.images import column_of, image_keys
from trips_examples.training.recipe import MANY_TEXTS


logger = logging.getLogger(__name__)


def as_seen(config: TripsConfig, processor: TripsProcessor) -> TripsConfig:
    """Return the configuration with the image size of the processor, which may differ from that of a checkpoint."""
    config = copy.deepcopy(config)
    config.vision_config.image_size = processor.image_processor.size["height"]
    return config


def settle_schedule(
    config: TripsConfig, texts_per_image: float, texts_in_batch: float, text_length: int, is_default: bool
):
    """
    Log what the schedule costs with texts of `text_length` tokens, of which an image has `texts_per_image` in the data
    and `texts_in_batch` share a batch. Let the image choose the patches in place of a default (`is_default`) in which
    the texts do, if that takes fewer operations. Warn of clearly more than those of the unpruned model: scores of the
    text in an early layer make the layers behind it compute each image once per text.
    """
    given = config.vision_config.schedule
    if not given.layers:
        return
    unpruned = forward_cost(config, text_length, UNPRUNED)
    costs = {given: forward_cost(config, text_length, given)}
    if is_default:
        by_image = SelectionSchedule.parse(MANY_TEXTS)
        costs[by_image] = forward_cost(config, text_length, by_image)
    schedule = min(costs, key=lambda each: costs[each].macs(texts_per_image))
    if schedule != given:
        logger.info("With %.1f texts per image, %s takes fewer operations than %s", texts_per_image, schedule, given)
    config.vision_config.schedule = schedule
    pruned = costs[schedule]
    share = pruned.macs(texts_in_batch) / unpruned.macs(texts_in_batch)
    logger.info(
        "%s keeps %d of %d patches, for %.2f times the operations of the unpruned model with one text per image, %.2f "
        "times with %.1f in a batch (an image of the data has %.1f)",
        schedule,
        pruned.num_kept,
        unpruned.num_kept,
        pruned.macs(1) / unpruned.macs(1),
        share,
        texts_in_batch,
        texts_per_image,
    )
    if share > 1.1:
        logger.warning("That is more than without pruning. Let the image score early layers, and the text a late one.")


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
