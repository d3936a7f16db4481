"""Checks of a split's texts against a tokenizer: their length, and unknown tokens."""

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

from datasets import Dataset, DatasetDict
from datasets.utils import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_trips import TripsProcessor
from trips_examples.data.faults import BadRowError, BadRows, Fault
from trips_examples.data.rows import column_of
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


class TextCheck:
    """
    Check of the texts of a split that a model reads or generates.

    Args:
        dataset (`Dataset`): Rows of the task.
        task (`str`)
        processor (`TripsProcessor`)
        limit (`int`, *optional*): Largest number of tokens, with special tokens. Default: the tokenizer's limit.

    Attributes:
        faults (`dict[int, Fault]`): Faults by row index.
        unknown (`dict[str, list[str]]`): Distinct texts with an unknown token, by column.
    """

    def __init__(self, dataset: Dataset, task: str, processor: TripsProcessor, limit: int | None = None):
        self.dataset, self.tokenizer = dataset, processor.tokenizer
        self.limit = processor.tokenizer.model_max_length if limit is None else limit
        self.faults, self.unknown = {}, {}
        self._check(TASKS[task].text, processor.tokenizer.num_special_tokens_to_add(), processor.clean_texts)
        if TASKS[task].written is not None:
            self._check(TASKS[task].written, 1, list)  # without cleaning, with a [SEP] at the end

    def _check(self, column: str, num_special: int, clean: Callable[[list[str]], list[str]]):
        rows = [[texts] if isinstance(texts, str) else texts for texts in column_of(self.dataset, column)]
        different = list(dict.fromkeys(text for texts in rows for text in texts))
        counts = {}
        for start in tqdm(range(0, len(different), 1000), desc=f"Tokenizing {column}", unit="000 texts"):
            batch = different[start : start + 1000]
            counts |= zip(batch, count_tokens(clean(batch), self.tokenizer))
        self.unknown[column] = [text for text, count in counts.items() if count.has_unknown]
        for place, (texts, source) in enumerate(zip(rows, column_of(self.dataset, "source"))):
            try:
                for text in texts:
                    check_length(counts[text], num_special, self.limit, column)
            except BadRowError as error:
                self.faults.setdefault(place, Fault(source, error.reason, error.detail))

    def describe_unknown(self, shown: int = 3) -> Iterator[str]:
        for column, texts in self.unknown.items():
            if texts:
                what = column if column.endswith("s") else f"{column}s"
                examples = ", ".join(map(repr, texts[:shown]))
                yield f"{len(texts)} different {what} hold words that the tokenizer does not know, e.g. {examples}"


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
        check = TextCheck(dataset, task, processor)
        BadRows(skip).settle(list(check.faults.values()), split, len(dataset))
        for line in check.describe_unknown():
            logger.warning(f"{split}: {line}.")
        if check.faults:
            dataset = dataset.select([place for place in range(len(dataset)) if place not in check.faults])
        fitting[split] = dataset
    return DatasetDict(fitting)
