"""The tasks: the columns of their rows, the conversion of records to rows, and the faults of bad rows."""

import json
import logging
import math
import reprlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Features, Image, Sequence, Value

from trips_examples.data.printing import printable, shortened, visible


logger = logging.getLogger(__name__)

SHOWN = 5  # faults that an error names
MAX_CHARACTERS = 100_000  # of a text. A tokenizer takes hundreds of times its memory before it can be measured


class BadRowError(ValueError):
    """Error of a row that cannot be used: a reason, the same for all rows that have it, and the value at fault."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason = reason
        self.detail = shortened(printable(detail))
        super().__init__(f"{self.reason} ({self.detail})" if detail else reason)


@dataclass(frozen=True)
class Fault:
    """The fault of a row or pair: its source, a reason that rows share, and the value."""

    source: str
    reason: str
    detail: str = ""

    @property
    def error(self) -> str:
        return str(BadRowError(self.reason, self.detail))

    def __str__(self) -> str:
        return visible(f"{self.source}: {self.error}")


def settle(faults: list[Fault], name: str, total: int, skip: bool):
    """
    Skip the faulty rows of a split of `total` rows, with a warning that counts them, or raise a `ValueError` that
    names the first few.
    """
    if not faults:
        return
    if skip:
        reasons = Counter(fault.reason for fault in faults)
        counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        logger.warning(f"Skipped {len(faults)} of the {total} rows of {name} ({counts}).")
        return
    lines = [f"{len(faults)} of the {total} rows of {name} cannot be used:"]
    lines += [str(fault) for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"and {len(faults) - SHOWN} more")
    named = "\n  ".join(lines)
    raise ValueError(f"{named}\nCorrect them, or leave them out with --skip_bad_rows.")


# Values of records


def is_missing(value: Any) -> bool:
    """Return whether a value is None, empty or blank (as in CSV) or NaN (as in pandas)."""
    if isinstance(value, str):
        value = value.strip()
    return value in (None, "", []) or value != value


def text_of(value: Any, column: str) -> str:
    """Return the stripped text of a value, or `""` if it is missing or has no visible character."""
    if is_missing(value):
        return ""
    is_text_or_number = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if not is_text_or_number or value in (math.inf, -math.inf):
        raise BadRowError(f"{column} is not text", reprlib.repr(value))
    text = str(value).strip()
    if text != printable(text):
        raise BadRowError(f"{column} is not valid Unicode", f"{reprlib.repr(text)} has half of a surrogate pair")
    if len(text) > MAX_CHARACTERS:
        raise BadRowError(f"{column} is too long", f"{len(text):,} characters, more than {MAX_CHARACTERS:,}")
    return text if any(character.isprintable() and not character.isspace() for character in text) else ""


def missing(column: str, record: dict) -> BadRowError:
    filled = [str(name) for name, value in record.items() if not is_missing(value)]
    return BadRowError(f"no {column}", f"it has {', '.join(filled) or 'nothing'}")


def filled_text(record: dict, column: str) -> str:
    text = text_of(record.get(column), column)
    if not text:
        raise missing(column, record)
    return text


def list_of(value: Any, column: str) -> list:
    """Return a list, parsed if it is a cell of CSV: a JSON list, or texts separated by `|`."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRowError(f"{column} is not a JSON list", f"{reprlib.repr(value)}: {error}") from error
    elif isinstance(value, str):
        value = [text for text in value.split("|") if text.strip()]
    if not isinstance(value, list):
        raise BadRowError(f"{column} is not a list", reprlib.repr(value))
    return value


def _box(record: dict, column: str) -> list[float]:
    try:
        numbers = list_of(record[column], column)
        box = [float(number) for number in numbers if not isinstance(number, bool)]
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRowError(f"{column} is not four numbers", reprlib.repr(record[column])) from error
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise BadRowError(f"{column} is not four numbers", str(box))
    return box


def one_or_several(record: dict, one: str | None, several: str) -> list:
    """Return the values of a record in its column `several`, or else in `one`."""
    if not is_missing(record.get(several)):
        return list_of(record[several], several)
    value = record.get(one)
    return value if isinstance(value, list) else [value]


# Rows of each task


def _question(record: dict) -> list[dict]:
    # VQAv2 has a dict per annotator, with the answer, the confidence and the annotator's number.
    answers = []
    for answer in one_or_several(record, "answer", "answers"):
        value = answer.get("answer") if isinstance(answer, dict) else answer
        text = text_of(value, "an answer")
        if text:
            answers.append(text)
    question = filled_text(record, "question")
    if not answers:
        raise missing("answer", record)
    row = {
        "question": question,
        "answers": answers,
        "region": None if is_missing(record.get("region")) else _box(record, "region"),
        "kind": text_of(record.get("kind"), "kind") or None,
        "wording": text_of(record.get("wording"), "wording") or None,
    }
    return [row]


def caption_texts(captions: list, record: dict) -> list[str]:
    """Return the texts of captions. Raise a `BadRowError` if one is empty."""
    texts = [text_of(caption, "a caption") for caption in captions]
    if not any(texts):
        raise missing("caption", record)
    if not all(texts):
        raise BadRowError("an empty caption", f"number {texts.index('') + 1} of {len(texts)}")
    return texts


def _captions(record: dict) -> list[dict]:
    captions = one_or_several(record, "caption", "captions")
    return [{"caption": text} for text in caption_texts(captions, record)]


# pandas writes floats if labels are missing.
LABELS = {"true": 1, "false": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}


def _statement(record: dict) -> list[dict]:
    is_of_albef = "statement" not in record and "sentence" in record
    value = record.get("label")
    if isinstance(value, bool):
        value = str(value)
    label = filled_text({**record, "label": value}, "label").lower()
    if label not in LABELS:
        raise BadRowError("label is not 1, 0, true or false", reprlib.repr(record["label"]))
    statement = filled_text(record, "sentence" if is_of_albef else "statement")
    return [{"statement": statement, "label": LABELS[label]}]


def _expression(record: dict) -> list[dict]:
    expression = filled_text(record, "expression")
    if is_missing(record.get("box")):
        raise missing("box", record)
    kind = text_of(record.get("kind"), "kind") or None
    return [{"expression": expression, "box": _box(record, "box"), "kind": kind}]


@dataclass(frozen=True)
class Task:
    """
    Data format of a task.

    Args:
        features (`Features`): Columns of the rows, one row per text. Rows with one image have one `image_id`.
            `question_id` is the given one, or the number of the row. `source` is the origin, as in
            "train.jsonl row 17".
        text (`str`): Column with the model's text input.
        needs (`str`): Required columns of a record, in words.
        read_texts (`Callable[[dict], list[dict]]`): Converts a record to rows, usually one, without the images, their
            ids, `question_id` and `source`.
        written (`str`, *optional*): Column of texts that the model generates. `texts` are both columns of texts.
    """

    features: Features
    text: str
    needs: str
    read_texts: Callable[[dict], list[dict]]
    written: str | None = None

    @property
    def has_two_images(self) -> bool:
        return "images" in self.features

    @property
    def texts(self) -> list[str]:
        return [self.text] if self.written is None else [self.text, self.written]


_TEXT = Value("string")
_BOX = Sequence(Value("float32"))  # (x0, y0, x1, y1) in pixels, x1 and y1 exclusive
_IMAGE = {"image": Image(), "image_id": _TEXT, "source": _TEXT, "question_id": _TEXT}
_IMAGES = {"images": Sequence(Image()), "image_ids": Sequence(_TEXT), "source": _TEXT, "question_id": _TEXT}
_CAPTIONS = {"image": Image(), "image_id": _TEXT, "source": _TEXT, "caption": _TEXT}
_QUESTION = {"question": _TEXT, "answers": Sequence(_TEXT), "region": _BOX, "kind": _TEXT, "wording": _TEXT}
_STATEMENT = {"statement": _TEXT, "label": Value("int64")}
_EXPRESSION = {"expression": _TEXT, "box": _BOX, "kind": _TEXT}

# There is an answer per annotator; images are left and right; label 1 is true; region and groups may be None.
TASKS = {
    "vqa": Task(Features(_IMAGE | _QUESTION), "question", "image, question and answer", _question, written="answers"),
    "captions": Task(Features(_CAPTIONS), "caption", "image and caption", _captions),
    "nlvr2": Task(Features(_IMAGES | _STATEMENT), "statement", "images (two), statement and label", _statement),
    "grounding": Task(Features(_IMAGE | _EXPRESSION), "expression", "image, expression and box", _expression),
}
