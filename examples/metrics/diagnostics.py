"""
Diagnostics of a run over a data set: signs that the tokenizer loses, how much predictions vary, their accuracy by the
kind of text and by the size of its target region, and the patches that each selection layer keeps.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from statistics import mean

import evaluate
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import Trainer

from modeling_trips import TripsProcessor, TripsSelection
from modeling_trips.inspection import (
    image_sensitivity,
    kept_coverage,
    patch_precision,
    region_recall,
    score_entropy,
    text_sensitivity,
)
from trips_examples.data.images import column_of, image_size, texts_of_column


logger = logging.getLogger(__name__)

COLLAPSED = 0.95  # share of the rows that get the same prediction
NUM_ROWS = 256
# Columns with the target region of a text: a box (x0, y0, x1, y1) in pixels of the image, or None.
REGION_COLUMNS = ("region", "box")
SIZES = ("smallest", "medium", "largest")


# Texts and predictions


def as_written(texts: Sequence[str], processor: TripsProcessor) -> list[str]:
    """
    Return the texts encoded and decoded: a model whose every token is right writes these. BERT's uncased tokenizer
    makes "cafe" of "café" and "50 %" of "50%". A text with an unknown token, which no model can write, stays.
    """
    different = list(dict.fromkeys(texts))
    rows = processor.tokenizer(different, add_special_tokens=False, verbose=False)["input_ids"] if different else []
    decoded = zip(different, rows, processor.post_process_answers(rows))
    unknown = processor.tokenizer.unk_token_id
    written = {text: text if unknown in row else result for text, row, result in decoded}
    return [written[text] for text in texts]


def most_tokens(data: DatasetDict, column: str, processor: TripsProcessor) -> int:
    """Return the number of tokens, with `[SEP]`, of the longest text of a column in any split."""
    texts = {text for rows in data.values() for text in texts_of_column(rows, column)}
    return 1 + max(map(len, processor.tokenizer([*texts], add_special_tokens=False)["input_ids"]))


def measurable_answers(references: list[list[str]], processor: TripsProcessor) -> list[list[str]]:
    """
    Return the references for `vqa_accuracy`: answers of several annotators as they are, for the official accuracy, and
    the answer of a single one as the tokenizer writes it.
    """
    written = iter(as_written([answers[0] for answers in references if len(answers) == 1], processor))
    return [[next(written)] if len(answers) == 1 else answers for answers in references]


def lost_signs(
    data: DatasetDict, column: str, processor: TripsProcessor, normalize: Callable[[str], str]
) -> dict[str, int]:
    """
    Return the number of texts of each split in a column (`"answers"` or `"caption"`) that the tokenizer cannot write
    as they are, and warn of them. `normalize` removes differences that the metric ignores.
    """
    counts = {}
    for split, rows in data.items():
        texts = texts_of_column(rows, column)
        pairs = {*zip(texts, as_written(texts, processor))}
        changed = {text: written for text, written in pairs if normalize(text) != normalize(written)}
        counts[split] = sum(text in changed for text in texts)
        if changed and PartialState().is_main_process:
            examples = ", ".join(f"{text!r} becomes {changed[text]!r}" for text in sorted(changed)[:3])
            logger.warning(
                "%s: the tokenizer loses signs in %d of the %d %s: %s. A tokenizer from scratch, the default, keeps "
                "them.",
                *(split, counts[split], len(texts), column if column.endswith("s") else f"{column}s", examples),
            )
    return counts


def variety(
    predictions: Sequence, truths: Sequence, name: str, accuracy: Callable[[list], float] | None = None
) -> dict[str, float]:
    """
    Log how often the most frequent truth is right and how much the predictions vary, in one line. A collapsed model,
    which gives nearly all rows one prediction although their truths vary more, is named in a warning.

    Return `different_predictions`; `most_frequent_share`, of the most frequent prediction; `collapsed`, 1 or 0; and
    with a function of the `accuracy` of predictions also `accuracy_majority`, of the most frequent truth. `name` is
    what they are, in the singular: `"answer"`.
    """
    counts, total = Counter(predictions), len(predictions)
    (favorite, count), (majority, true_count) = counts.most_common(1)[0], Counter(truths).most_common(1)[0]
    collapsed = count / total >= COLLAPSED and count > true_count
    metrics = {"different_predictions": len(counts), "most_frequent_share": count / total}
    line = f"The model gives {len(counts)} different {name}s for {total} rows."
    if accuracy is not None:
        metrics["accuracy_majority"] = accuracy([majority] * total)
        line = f"The most frequent {name}, {majority!r}, is right for {metrics['accuracy_majority']:.1%}. {line}"
    if PartialState().is_main_process:
        logger.info(line)
        if collapsed:
            logger.warning("The model has collapsed: %r is its %s for %d of %d rows.", favorite, name, count, total)
    return {**metrics, "collapsed": int(collapsed)}


# Selection


@torch.no_grad()
def diagnose_selection(trainer: Trainer) -> dict[str, float]:
    """
    Measure the kept patches of each selection layer on the first rows of the evaluation data.

    Returns:
        `dict[str, float]`: for selection layer L `layer{L}_kept` (number of kept candidates), `_entropy`, `_coverage`,
        `_text_sensitivity` (1 minus the overlap of texts that share an image) and `_image_sensitivity` (of several
        images). With target regions also `_patch_precision`, `_region_recall`, and, once, `patch_precision_at_random`,
        that of random selection. Empty without selection.
    """
    model, processor = trainer.accelerator.unwrap_model(trainer.model).eval(), trainer.processing_class
    rows = [trainer.eval_dataset[row] for row in range(min(NUM_ROWS, len(trainer.eval_dataset)))]
    inputs = trainer.data_collator(rows)
    inputs.pop("sources", None)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    height, width = inputs["pixel_values"].shape[-2:]
    num_patches = (height // processor.patch_size) * (width // processor.patch_size)
    image_index = inputs["image_index"].flatten()
    num_images = len(image_index.unique())
    metrics = {}
    for layer, selection in zip(model.config.vision_config.schedule.layers, model(**inputs).selection):
        name = f"layer{layer}"
        metrics[f"{name}_kept"] = float(selection.kept_indices.shape[1])
        metrics[f"{name}_entropy"] = score_entropy(selection).mean().item()
        metrics[f"{name}_coverage"] = kept_coverage(selection, num_patches)
        if num_images < len(image_index):
            metrics[f"{name}_text_sensitivity"] = text_sensitivity(selection, image_index, num_patches)
        if num_images > 1:
            metrics[f"{name}_image_sensitivity"] = image_sensitivity(selection, image_index, num_patches)
        metrics |= _region_metrics(selection, rows, processor, name)
    return metrics


def _region_metrics(selection: TripsSelection, rows: list[dict], processor, name: str) -> dict[str, float]:
    column = next((column for column in REGION_COLUMNS if column in rows[0]), None)
    known = {number: row.get(column) for number, row in enumerate(rows)}
    regions = {number: torch.tensor(box, dtype=torch.float32) for number, box in known.items() if box is not None}
    if not regions:
        return {}
    sizes = [image_size(rows[number]) for number in regions]
    boxes = processor.patch_boxes([selection.kept_indices[number] for number in regions], sizes)
    pairs = [*zip(boxes, regions.values())]
    areas = [((region[2] - region[0]) * (region[3] - region[1])).item() for region in regions.values()]
    shares = [area / math.prod(size) for area, size in zip(areas, sizes)]
    return {
        f"{name}_patch_precision": mean(patch_precision(*pair) for pair in pairs),
        f"{name}_region_recall": mean(region_recall(*pair) for pair in pairs),
        "patch_precision_at_random": mean(shares),
    }


def groups_of(rows: Dataset) -> dict[str, list[int]]:
    """
    Return the indices of the rows of each known `kind`, of each known `wording`, and of the thirds with the smallest,
    medium and largest boxes. Rows without a column `kind` have no groups.
    """
    if "kind" not in rows.column_names:
        return {}
    groups = defaultdict(list)
    for column, ending in (("kind", ""), ("wording", "_wording")):
        for place, name in enumerate(column_of(rows, column) if column in rows.column_names else ()):
            if name is not None:
                groups[name + ending].append(place)
    column = next(column for column in REGION_COLUMNS if column in rows.column_names)
    areas = {place: (box[2] - box[0]) * (box[3] - box[1]) for place, box in enumerate(column_of(rows, column)) if box}
    thirds = torch.tensor(sorted(areas, key=areas.__getitem__), dtype=torch.long).tensor_split(3)
    return dict(sorted(groups.items())) | {name: third.tolist() for name, third in zip(SIZES, thirds) if len(third)}


def accuracy_by_group(metric: evaluate.Metric, predictions: list, references: list, rows: Dataset) -> dict[str, float]:
    """Return the accuracy on each of `groups_of(rows)`, as `accuracy_{group}`."""
    results = {}
    for name, places in groups_of(rows).items():
        own, truths = ([values[place] for place in places] for values in (predictions, references))
        results[f"accuracy_{name}"] = metric.compute(predictions=own, references=truths)["accuracy"]
    return results
