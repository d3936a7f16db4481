"""
Diagnostics of a run over a data set: texts that the model cannot write, how much predictions vary, their accuracy by
the kind of text, and the patches that each selection layer keeps.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
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
from trips_examples.data.images import column_of, image_size, regions_of, texts_of_column
from trips_examples.data.tasks import SHOWN


logger = logging.getLogger(__name__)

COLLAPSED = 0.95  # share of the rows that get the same prediction
UNWRITABLE_SHARE = 0.01  # share of the texts of a split from which on another text model is advised
UNWRITABLE_REMEDY = (
    "A multilingual text model can write them: --text_model_name_or_path intfloat/multilingual-e5-small, see "
    "docs/pictures.md, other languages."
)
NUM_ROWS = 256


# Texts and predictions


def written_texts(texts: Iterable[str], processor: TripsProcessor) -> dict[str, str | None]:
    """
    Return what a model whose every token is right writes in place of each text: the text encoded and decoded, or None
    for a text with an unknown token. BERT's uncased tokenizer makes "cafe" of "café" and "50 %" of "50%".
    """
    different = list(dict.fromkeys(texts))
    if not different:
        return {}
    token_ids = processor.tokenizer(different, add_special_tokens=False, verbose=False)["input_ids"]
    decoded = processor.post_process_answers(token_ids)
    unknown = processor.tokenizer.unk_token_id
    written = {}
    for text, row, result in zip(different, token_ids, decoded):
        written[text] = None if unknown in row else result
    return written


def most_tokens(data: DatasetDict, column: str, processor: TripsProcessor) -> int:
    """Return the number of tokens, with `[SEP]`, of the longest text of a column in any split."""
    texts: set[str] = set()
    for rows in data.values():
        texts.update(texts_of_column(rows, column))
    token_ids = processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return 1 + max(len(row) for row in token_ids)


def measurable_answers(references: list[list[str]], processor: TripsProcessor) -> list[list[str]]:
    """
    Return the references for `vqa_accuracy`: answers of several annotators as they are, for the official accuracy, and
    the answer of a single one as the tokenizer writes it, or as it is if no model can write it.
    """
    single = [answers[0] for answers in references if len(answers) == 1]
    written = written_texts(single, processor)
    measurable = []
    for answers in references:
        result = written[answers[0]] if len(answers) == 1 else None
        measurable.append(answers if result is None else [result])
    return measurable


def unwritable_texts(
    data: DatasetDict, column: str, processor: TripsProcessor, normalize: Callable[[str], str]
) -> tuple[dict[str, int], list[str]]:
    """
    Count the texts of each split in a column (`"answers"` or `"caption"`) that the model cannot write, because its
    tokenizer does not know their words or drops their signs. `normalize` removes differences that the metric ignores.

    Returns:
        The counts, and what to tell the user: a sentence per split that has such texts, and a remedy if they are more
        than `UNWRITABLE_SHARE` of a split.
    """
    counts = {}
    sentences = []
    name = column if column.endswith("s") else f"{column}s"
    needs_remedy = False
    for split, rows in data.items():
        texts = texts_of_column(rows, column)
        lost = {}
        for text, result in written_texts(texts, processor).items():
            if result is None:
                lost[text] = f"{text!r} has words that its tokenizer does not know"
            elif normalize(text) != normalize(result):
                lost[text] = f"{text!r} becomes {result!r}"
        counts[split] = sum(text in lost for text in texts)
        if lost:
            counted = f"the model cannot write {counts[split]} of the {len(texts)} {name}"
            sentences.append(f"{split}: {counted}: {', '.join(list(lost.values())[:SHOWN])}.")
        needs_remedy = needs_remedy or counts[split] > UNWRITABLE_SHARE * len(texts)
    if needs_remedy:
        sentences.append(UNWRITABLE_REMEDY)
    return counts, sentences


def warn_of_unwritable_texts(
    data: DatasetDict, column: str, processor: TripsProcessor, normalize: Callable[[str], str]
) -> dict[str, int]:
    """Return the counts of [`unwritable_texts`], and log its sentences in the main process."""
    counts, sentences = unwritable_texts(data, column, processor, normalize)
    if PartialState().is_main_process:
        for sentence in sentences:
            logger.warning(sentence)
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
    counts = Counter(predictions)
    total = len(predictions)
    favorite, count = counts.most_common(1)[0]
    majority, true_count = Counter(truths).most_common(1)[0]
    is_collapsed = count / total >= COLLAPSED and count > true_count
    metrics = {"different_predictions": len(counts), "most_frequent_share": count / total}
    line = f"The model gives {len(counts)} different {name}s for {total} rows."
    if accuracy is not None:
        metrics["accuracy_majority"] = accuracy([majority] * total)
        line = f"The most frequent {name}, {majority!r}, is right for {metrics['accuracy_majority']:.1%}. {line}"
    if PartialState().is_main_process:
        logger.info(line)
        if is_collapsed:
            logger.warning("The model has collapsed: %r is its %s for %d of %d rows.", favorite, name, count, total)
    metrics["collapsed"] = int(is_collapsed)
    return metrics


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
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    processor = trainer.processing_class
    rows = trainer.eval_dataset.take(min(NUM_ROWS, len(trainer.eval_dataset)))
    inputs = trainer.data_collator(list(rows))
    inputs.pop("sources", None)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    height, width = inputs["pixel_values"].shape[-2:]
    num_patches = (height // processor.patch_size) * (width // processor.patch_size)
    image_index = inputs["image_index"].flatten()
    num_images = len(image_index.unique())
    selections = model(**inputs).selection
    metrics = {}
    for layer, selection in zip(model.config.vision_config.schedule.layers, selections):
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


def _region_metrics(selection: TripsSelection, rows: Dataset, processor, name: str) -> dict[str, float]:
    regions = {number: region for number, region in enumerate(regions_of(rows)) if region is not None}
    if not regions:
        return {}
    sizes = [image_size(rows[number]) for number in regions]
    kept_indices = [selection.kept_indices[number] for number in regions]
    precisions = []
    recalls = []
    shares = []
    for boxes, region, size in zip(processor.patch_boxes(kept_indices, sizes), regions.values(), sizes):
        target = torch.tensor(region, dtype=torch.float32)
        area = (target[2] - target[0]) * (target[3] - target[1])
        precisions.append(patch_precision(boxes, target))
        recalls.append(region_recall(boxes, target))
        shares.append(area.item() / math.prod(size))
    return {
        f"{name}_patch_precision": mean(precisions),
        f"{name}_region_recall": mean(recalls),
        "patch_precision_at_random": mean(shares),
    }


def groups_of(rows: Dataset) -> dict[str, list[int]]:
    """Return the indices of the rows of each known `kind`, and of each known `wording`."""
    groups = defaultdict(list)
    for column, ending in (("kind", ""), ("wording", "_wording")):
        values = column_of(rows, column) if column in rows.column_names else []
        for place, value in enumerate(values):
            if value is not None:
                groups[f"{value}{ending}"].append(place)
    return dict(sorted(groups.items()))


def accuracy_by_group(metric: evaluate.Metric, predictions: list, references: list, rows: Dataset) -> dict[str, float]:
    """Return the accuracy on each of `groups_of(rows)`, as `accuracy_{group}`."""
    results = {}
    for name, places in groups_of(rows).items():
        own_predictions = [predictions[place] for place in places]
        own_references = [references[place] for place in places]
        scores = metric.compute(predictions=own_predictions, references=own_references)
        results[f"accuracy_{name}"] = scores["accuracy"]
    return results
