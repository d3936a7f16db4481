"""Texts that a model writes, over a data set: signs that its tokenizer loses, and how much predictions vary."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence

from accelerate import PartialState
from datasets import Dataset, DatasetDict

from modeling_trips import TripsProcessor
from trips_examples.data.images import column_of


logger = logging.getLogger(__name__)

COLLAPSED = 0.95  # share of the rows that get the same prediction


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


def texts_of_column(rows: Dataset, column: str) -> list[str]:
    """Return the texts of a column of texts or of lists of texts."""
    return [text for cell in column_of(rows, column) for text in ([cell] if isinstance(cell, str) else cell)]


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

    Return `eval_different_predictions`; `eval_most_frequent_share`, of the most frequent prediction; `eval_collapsed`,
    1 or 0; and with a function of the `accuracy` of predictions also `eval_accuracy_majority`, of the most frequent
    truth. `name` is what they are, in the singular: `"answer"`.
    """
    counts, total = Counter(predictions), len(predictions)
    (favorite, count), (majority, true_count) = counts.most_common(1)[0], Counter(truths).most_common(1)[0]
    collapsed = count / total >= COLLAPSED and count > true_count
    metrics = {"eval_different_predictions": len(counts), "eval_most_frequent_share": count / total}
    line = f"The model gives {len(counts)} different {name}s for {total} rows."
    if accuracy is not None:
        metrics["eval_accuracy_majority"] = accuracy([majority] * total)
        line = f"The most frequent {name}, {majority!r}, is right for {metrics['eval_accuracy_majority']:.1%}. {line}"
    if PartialState().is_main_process:
        logger.info(line)
        if collapsed:
            logger.warning("The model has collapsed: %r is its %s for %d of %d rows.", favorite, name, count, total)
    return {**metrics, "eval_collapsed": int(collapsed)}
