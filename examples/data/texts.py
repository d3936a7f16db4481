"""What a tokenizer makes of the texts of a split: too many tokens, none, or ones that it does not know."""

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
    """How many tokens a text has, without special ones, and whether the tokenizer does not know one of them."""

    length: int
    has_unknown: bool


def count_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[TokenCount]:
    """The tokens of each of the texts."""
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [TokenCount(len(row), tokenizer.unk_token_id in row) for row in rows]


def check_length(count: TokenCount, num_special: int, limit: int, what: str):
    """Raises a `BadRowError` for a text without tokens, or of more than `limit` with the special ones."""
    if count.length == 0:
        raise BadRowError(f"{what} without tokens", "the tokenizer knows none of its characters")
    if count.length + num_special > limit:
        raise BadRowError(f"more than {limit} tokens", f"{what} has {count.length + num_special}")


class TextCheck:
    """
    Looks through the texts of a split that a model reads or writes.

    Args:
        dataset (`Dataset`): Rows of the task.
        task (`str`)
        processor (`TripsProcessor`)
        limit (`int`, *optional*): Tokens a text may have, with special ones. Default: the tokenizer's.

    Attributes:
        faults (`dict[int, Fault]`): What is wrong with a row, by its place in the split.
        unknown (`dict[str, list[str]]`): By column, the different texts that hold a token which the tokenizer does not
            know. Such an answer can be learnt by no model, and such a word is not seen.
    """

    def __init__(self, dataset: Dataset, task: str, processor: TripsProcessor, limit: int | None = None):
        self.dataset, self.tokenizer = dataset, processor.tokenizer
        self.limit = processor.tokenizer.model_max_length if limit is None else limit
        self.faults, self.unknown = {}, {}
        self._check(TASKS[task].text, processor.tokenizer.num_special_tokens_to_add(), processor.clean_texts)
        if TASKS[task].written is not None:
            self._check(TASKS[task].written, 1, list)  # as it is, with a [SEP] where it ends

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
    The rows whose texts fit the model, found before training starts; words that it does not know are warned of.

    Args:
        data (`DatasetDict`): Splits of the task.
        task (`str`)
        processor (`TripsProcessor`)
        skip (`bool`): Whether to leave other rows out, with a warning that counts them, rather than to raise.

    Raises:
        `ValueError`: Where some do not fit and `skip` is off, naming the first few.
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
