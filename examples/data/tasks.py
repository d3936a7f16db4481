"""The tasks: the columns of their rows, and conversion of records to rows."""

import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Features, Image, Sequence, Value

from trips_examples.data.faults import BadRowError, printable
from trips_examples.data.formats import parsed_json


# Schemas, with one row per text. `image` is decoded to a `PIL.Image` of its stored mode when a row is read; the
# processor converts it with `convert_to_rgb`. `image_id` is equal for rows that share an image. `question_id` is the
# given one, or the number of the row. `source` is the origin, as in "train.jsonl row 17".

VQA_FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("string"),
        "question_id": Value("string"),
        "question": Value("string"),
        "answers": Sequence(Value("string")),  # one per annotator
        "region": Sequence(Value("float32")),  # target region, as `box` below; None if unknown
        "kind": Value("string"),  # kind of the question, as VQAv2's question_type; None if unknown
        "answer_type": Value("string"),  # as in VQAv2; None if unknown
        "source": Value("string"),
    }
)
CAPTION_FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("string"),
        "caption": Value("string"),
        "source": Value("string"),
    }
)
NLVR2_FEATURES = Features(
    {
        "images": Sequence(Image()),  # left and right
        "image_ids": Sequence(Value("string")),
        "question_id": Value("string"),
        "statement": Value("string"),
        "label": Value("int64"),  # 1: true, 0: false
        "source": Value("string"),
    }
)
GROUNDING_FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("string"),
        "question_id": Value("string"),
        "expression": Value("string"),
        "box": Sequence(Value("float32")),  # (x0, y0, x1, y1) in pixels of the image, x1 and y1 exclusive
        "kind": Value("string"),  # kind of the expression; None if unknown
        "source": Value("string"),
    }
)

BOX_COLUMNS = {"box", "region"}


@dataclass(frozen=True)
class Task:
    """
    Data format of a task.

    Args:
        name (`str`): Name in options.
        features (`Features`): Columns of the rows.
        text (`str`): Column with the model's text input.
        columns (`tuple[str, ...]`): Columns that are read from a record, besides those of the images.
        needs (`str`): Required columns of a record, in words.
        read_texts (`Callable[[dict], list[dict]]`):
            Converts a record to rows, usually one, without the image columns and `source`. `question_id` is empty if
            the record has none.
        written (`str`, *optional*): Column of texts that the model generates.
    """

    name: str
    features: Features
    text: str
    columns: tuple[str, ...]
    needs: str
    read_texts: Callable[[dict], list[dict]]
    written: str | None = None

    @property
    def image_column(self) -> str:
        return "image" if "image" in self.features else "images"


# Texts of each task


def text_of(value: Any, column: str) -> str:
    """Return the stripped text of a value, or `""` if it is missing or has no visible character."""
    if is_missing(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRowError(f"{column} is not text", reprlib.repr(value))
    text = str(value).strip()
    if text != printable(text):
        raise BadRowError(f"{column} is not valid Unicode", f"{reprlib.repr(text)} has half of a surrogate pair")
    return text if any(character.isprintable() and not character.isspace() for character in text) else ""


def is_missing(value: Any) -> bool:
    """Return whether a value is None, empty (as in CSV) or NaN (as in pandas)."""
    return value in (None, "", []) or value != value


def missing(column: str, record: dict) -> BadRowError:
    filled = [str(name) for name, value in record.items() if not is_missing(value)]
    return BadRowError(f"no {column}", f"it has {', '.join(filled) or 'nothing'}")


def filled_text(record: dict, column: str) -> str:
    text = text_of(record.get(column), column)
    if not text:
        raise missing(column, record)
    return text


def list_of(value: Any, column: str) -> list:
    """Return a list, parsed if it is a cell of CSV."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parsed_json(value)
        except BadRowError as error:
            raise BadRowError(f"{column} is not a JSON list", f"{reprlib.repr(value)}: {error.detail}") from error
    elif isinstance(value, str):
        value = [text for text in value.split("|") if text.strip()]
    if not isinstance(value, list):
        raise BadRowError(f"{column} is not a list", reprlib.repr(value))
    return value


def _one_or_several(record: dict, one: str, several: str) -> list:
    if not is_missing(record.get(several)):
        return list_of(record[several], several)
    value = record.get(one)
    return value if isinstance(value, list) else [value]


def _question(record: dict) -> list[dict]:
    question = filled_text(record, "question")
    # VQAv2 has a dict per annotator, with the answer, the confidence and the annotator's number.
    answers = _one_or_several(record, "answer", "answers")
    texts = [text_of(each.get("answer") if isinstance(each, dict) else each, "an answer") for each in answers]
    texts = [text for text in texts if text]
    if not texts:
        raise missing("answer", record)
    region = None if is_missing(record.get("region")) else _box(record, "region")
    question_id = text_of(record.get("question_id"), "question_id")
    kind = text_of(record.get("kind"), "kind") or text_of(record.get("question_type"), "question_type")
    row = {"question_id": question_id, "question": question, "answers": texts, "region": region, "kind": kind or None}
    return [{**row, "answer_type": text_of(record.get("answer_type"), "answer_type") or None}]


def _captions(record: dict) -> list[dict]:
    captions = _one_or_several(record, "caption", "captions")
    return [{"caption": text} for text in caption_texts(captions, record)]


def caption_texts(captions: list, record: dict) -> list[str]:
    """Return the texts of captions. Raise a `BadRowError` if one is empty."""
    texts = [text_of(caption, "a caption") for caption in captions]
    if not any(texts):
        raise missing("caption", record)
    if not all(texts):
        raise BadRowError("an empty caption", f"number {texts.index('') + 1} of {len(texts)}")
    return texts


# pandas writes floats if labels are missing.
LABELS = {"true": 1, "false": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}


def _statement(record: dict) -> list[dict]:
    statement = filled_text(record, "statement")
    label = record.get("label")
    label = (str(label) if isinstance(label, bool) else text_of(label, "label")).lower()
    if not label:
        raise missing("label", record)
    if label not in LABELS:
        raise BadRowError("label is not 1, 0, true or false", reprlib.repr(record["label"]))
    question_id = text_of(record.get("question_id"), "question_id")
    return [{"question_id": question_id, "statement": statement, "label": LABELS[label]}]


def has_area(box: list[float]) -> bool:
    """Return whether both sides of a box (x0, y0, x1, y1) have at least a hundredth of a pixel."""
    x0, y0, x1, y1 = box
    return min(x1 - x0, y1 - y0) >= 0.01


def _box(record: dict, column: str) -> list[float]:
    """Return the corners (x0, y0, x1, y1) of a box. Raise a `BadRowError` if it has no area."""
    try:
        box = [float(number) for number in list_of(record[column], column)]
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRowError(f"{column} is not four numbers", reprlib.repr(record[column])) from error
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise BadRowError(f"{column} is not four numbers", str(box))
    if not has_area(box):
        raise BadRowError(f"{column} without area", f"[x0, y0, x1, y1] = {box}")
    return box


def _expression(record: dict) -> list[dict]:
    expression = filled_text(record, "expression")
    if is_missing(record.get("box")):
        raise missing("box", record)
    box = _box(record, "box")
    row = {"question_id": text_of(record.get("question_id"), "question_id"), "expression": expression, "box": box}
    return [{**row, "kind": text_of(record.get("kind"), "kind") or None}]


_TASKS = [
    Task(
        name="vqa",
        features=VQA_FEATURES,
        text="question",
        columns=(
            *("image_id", "question_id", "question", "answer", "answers", "region"),
            *("kind", "question_type", "answer_type"),
        ),
        needs="image, question and answer",
        read_texts=_question,
        written="answers",
    ),
    Task(
        name="captions",
        features=CAPTION_FEATURES,
        text="caption",
        columns=("image_id", "caption", "captions"),
        needs="image and caption",
        read_texts=_captions,
    ),
    Task(
        name="nlvr2",
        features=NLVR2_FEATURES,
        text="statement",
        columns=("image_ids", "question_id", "statement", "label"),
        needs="images (two), statement and label",
        read_texts=_statement,
    ),
    Task(
        name="grounding",
        features=GROUNDING_FEATURES,
        text="expression",
        columns=("image_id", "question_id", "expression", "box", "kind"),
        needs="image, expression and box",
        read_texts=_expression,
    ),
]
TASKS = {task.name: task for task in _TASKS}
