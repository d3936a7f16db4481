"""Checks of a split's texts against a tokenizer: their length, and unknown tokens."""

import logging
from collections.abc import Callable
from typing import NamedTuple

from datasets import Dataset, DatasetDict
from datasets.utils import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_trips import TripsProcessor
from trips_examples.data.faults import BadRowError, Fault
from trips_examples.data.rows import column_of, without_faults
from trips_examples.data.tasks import TASKS


logger = logging.getLogger(__name__)


class TokenCount(NamedTuple):
    """Number of tokens of a text, without special tokens, and whether one of them is unknown."""

    length: int
    has_unknown: bool


def count_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[TokenCount]:
    """Count the tokens of each text."""
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [TokenCount(len(row), tokenizer.unk_token_id in row) for row in rows]


def check_length(count: TokenCount, num_special: int, limit: int, what: str):
    """Raise a `BadRowError` for a text without tokens, or with more than `limit` tokens including special ones."""
    if count.length == 0:
        raise BadRowError(f"{what} without tokens", "the tokenizer knows none of its characters")
    if count.length + num_special > limit:
        raise BadRowError(f"more than {limit} tokens", f"{what} has {count.length + num_special}")


def check_texts(dataset: Dataset, task: str, processor: TripsProcessor) -> tuple[dict[int, Fault], list[str]]:
    """
    Check the texts of a split that a model reads or generates.

    Args:
        dataset (`Dataset`): Rows of the task.
        task (`str`)
        processor (`TripsProcessor`)

    Returns:
        `tuple[dict[int, Fault], list[str]]`: Faults by row index, and a description of the texts with an unknown token
        for each column that has some.
    """
    tokenizer = processor.tokenizer
    columns: list[tuple[str, int, Callable[[list[str]], list[str]]]] = [
        (TASKS[task].text, tokenizer.num_special_tokens_to_add(), processor.clean_texts)
    ]
    if TASKS[task].written is not None:
        columns.append((TASKS[task].written, 1, list))  # without cleaning, with a [SEP] at the end
    faults: dict[int, Fault] = {}
    unknown = []
    for column, num_special, clean in columns:
        rows = [[texts] if isinstance(texts, str) else texts for texts in column_of(dataset, column)]
        different = list(dict.fromkeys(text for texts in rows for text in texts))
        counts: dict[str, TokenCount] = {}
        for start in tqdm(range(0, len(different), 1000), desc=f"Tokenizing {column}", unit="000 texts"):
            batch = different[start : start + 1000]
            counts |= zip(batch, count_tokens(clean(batch), tokenizer))
        for place, (texts, source) in enumerate(zip(rows, column_of(dataset, "source"))):
            try:
                for text in texts:
                    check_length(counts[text], num_special, tokenizer.model_max_length, column)
            except BadRowError as error:
                faults.setdefault(place, Fault(source, error.reason, error.detail))
        if with_unknown := [text for text, count in counts.items() if count.has_unknown]:
            what = column if column.endswith("s") else f"{column}s"
            examples = ", ".join(map(repr, with_unknown[:3]))
            unknown.append(
                f"{len(with_unknown)} different {what} hold words that the tokenizer does not know, e.g. {examples}"
            )
    return faults, unknown


def with_fitting_texts(data: DatasetDict, task: str, processor: TripsProcessor, skip: bool) -> DatasetDict:
    """
    Return the rows whose texts fit the model, and warn of unknown words.

    Args:
        data (`DatasetDict`): Splits of the task.
        task (`str`)
        processor (`TripsProcessor`)
        skip (`bool`): Whether to skip other rows with a warning that counts them, instead of raising an error.

    Raises:
        `ValueError`: Some texts do not fit and `skip` is off. The message names the first few.
    """
    fitting = {}
    for split, dataset in data.items():
        faults, unknown = check_texts(dataset, task, processor)
        fitting[split] = without_faults(dataset, faults, split, skip)
        for line in unknown:
            logger.warning(f"{split}: {line}.")
    return DatasetDict(fitting)
