"""Checking of rows: of records when they are read, and of texts when the processor is known."""

import contextlib
import hashlib
import logging
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Value
from datasets.fingerprint import Hasher

from modeling_trips import TripsProcessor, __version__
from trips_examples.data.annotations import parsed_record
from trips_examples.data.images import check_image, column_of, path_or_bytes, without_decoding
from trips_examples.data.tasks import (
    AS_SIZE,
    TASKS,
    BadRowError,
    Fault,
    Task,
    filled_text,
    has_area,
    is_missing,
    list_of,
    missing,
    settle,
    text_of,
)


logger = logging.getLogger(__name__)

ROWS_PER_PROCESS = 2000  # a data set of fewer rows is checked by one process
_TEXT = Value("string")
CHECKED = {"source": _TEXT, "reason": _TEXT, "detail": _TEXT, "ids": [_TEXT], "contents": [_TEXT]}


def stamp_of(path: str | Path) -> str:
    """Return a path with the time and size of its file, for fingerprints."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return f"{path} -"
    return f"{path} {status.st_mtime_ns} {status.st_size}"


@dataclass
class RowReader:
    """
    Converter from the records of a split to checked rows.

    Args:
        task (`Task`)
        name (`str`): Name of the split, for `source` and errors.
        image_root (`str`): Folder that paths are relative to.
        patch_size (`int`): Side of the model's patches in pixels.
    """

    task: Task
    name: str
    image_root: str
    patch_size: int = 1

    def __post_init__(self):
        self.sizes: dict[str, tuple[int, int]] = {}  # each image is decoded once

    def rows_and_faults(self, records: Dataset) -> tuple[Dataset, list[Fault]]:
        """
        Return the rows that can be used, and the faults of the others.

        Raises:
            `ValueError`: No record has the task's text.
        """
        if len(records) == 0:
            raise ValueError(f"{self.name} has no rows. It needs the columns {self.task.needs}.")
        records = without_decoding(records)
        num_proc = min(os.cpu_count() or 1, len(records) // ROWS_PER_PROCESS)
        checked = records.map(
            self.rows_of_batch,
            batched=True,
            batch_size=100,
            with_indices=True,
            remove_columns=records.column_names,
            features=Features({**self.task.features, **CHECKED}),
            num_proc=num_proc if num_proc > 1 else None,
            new_fingerprint=self.fingerprint(records),
            desc=f"Checking {self.name}",
        )
        good, faults, content_of = [], [], {}
        for place, (source, *fault, ids, contents) in enumerate(zip(*(column_of(checked, name) for name in CHECKED))):
            for image_id, content in zip(ids or (), contents or ()):
                if (other := content_of.setdefault(image_id, content)) != content:
                    fault = ["image_id of two images", f"{image_id}: {other} and {content}"]
            if fault[0] is None:
                good.append(place)
            else:
                faults.append(Fault(source, *fault))
        if not good and {fault.reason for fault in faults} == {f"no {self.task.text}"}:
            raise ValueError(f"No row of {self.name} has {self.task.text}. {self.remedy(_parsed(records[0]))}")
        rows = checked.select_columns(list(self.task.features))
        return rows if len(good) == len(rows) else rows.select(good), faults

    def remedy(self, record: dict) -> str:
        """Name the task that a record without the text of this one is for, or the columns that this one needs."""
        others = (name for name, task in TASKS.items() if not is_missing(record.get(task.text)) and task != self.task)
        if (other := next(others, None)) is not None:
            return f"The rows have {TASKS[other].text}: give a file of this task, or choose the task {other!r}."
        return f"It needs the columns {self.task.needs}, and the first row has {', '.join(record)}."

    def fingerprint(self, records: Dataset) -> str:
        """Hash the records, the settings and the versions of the image files, so that repaired images are checked."""
        stamps = hashlib.blake2b(digest_size=16)
        names = {"json", "image", "images", "left_image", "right_image"} & {*records.column_names}
        if not any("binary" in str(records.features.arrow_schema.field(name).type) for name in names):
            for record in records.select_columns(sorted(names)):
                with contextlib.suppress(BadRowError):
                    for path in map(self.path, self.image_values(_parsed(record))):
                        stamps.update(stamp_of(path).encode("utf-8", "backslashreplace"))
        settings = (self.task, self.name, self.image_root, self.patch_size, __version__)
        return Hasher.hash((records._fingerprint, settings, stamps.hexdigest()))

    def rows_of_batch(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = []
        for index, *values in zip(indices, *batch.values()):
            record = dict(zip(batch, values))
            source = f"{self.name} row {record.get('row', index + 1)}"
            try:
                rows += self.rows(source, _parsed(record))
            except BadRowError as error:
                rows.append({"source": source, "reason": error.reason, "detail": error.detail})
        return {name: [row.get(name) for row in rows] for name in {**self.task.features, **CHECKED}}

    def rows(self, source: str, record: dict) -> list[dict]:
        """Return the rows of a record, with the `ids` and the `contents` (paths or hashes) of its images."""
        rows = self.task.read_texts(record)
        images, contents, sizes = zip(*map(self.found, self.image_values(record)))
        given = record.get("image_ids") if self.task.has_two_images else [record.get("image_id")]
        given = [None] * len(contents) if is_missing(given) else list_of(given, "image_ids")
        if len(given) != len(contents):
            raise BadRowError(f"not {len(contents)} image_ids", reprlib.repr(given))
        ids = [text_of(value, "image_id") or content for value, content in zip(given, contents)]
        shared: dict[str, Any] = {"image": images[0], "image_id": ids[0]}
        if self.task.has_two_images:
            shared = {"images": list(images), "image_ids": ids}
        if "question_id" in self.task.features:
            question_id = text_of(record.get("question_id", record.get("identifier")), "question_id")
            shared["question_id"] = question_id or source.rpartition(" ")[2]
        for row in rows:
            for column in {"box", "region"} & row.keys():
                row[column] = row[column] and _within(row[column], sizes[0], column)
        return [{**shared, **row, "source": source, "ids": ids, "contents": list(contents)} for row in rows]

    def found(self, value: Any) -> tuple[dict, str, tuple[int, int]]:
        """Return an image as `datasets.Image` stores it, what identifies its content, and its (width, height)."""
        value = path_or_bytes(value)
        is_path = not isinstance(value, bytes)
        content = self.path(value) if is_path else hashlib.blake2b(value, digest_size=16).hexdigest()
        if content not in self.sizes:
            self.sizes[content] = check_image(content if is_path else value, self.patch_size)
        image = {"bytes": None, "path": content} if is_path else {"bytes": value, "path": None}
        return image, content, self.sizes[content]

    def path(self, value: Any) -> str:
        path = filled_text({"image": value}, "image")
        return os.path.join(self.image_root, path if ".." in path else os.path.normpath(path))

    def image_values(self, record: dict) -> list:
        """Return the images of a record. Raise a `BadRowError` if one is missing."""
        columns = ["left_image", "right_image"] if self.task.has_two_images else ["image"]
        if self.task.has_two_images and not is_missing(values := record.get("images")):
            values = list_of(values, "images")
            if len(values) != 2:
                raise BadRowError("not two images", reprlib.repr(values))
            if any(map(is_missing, values)):
                raise BadRowError("no image", f"images is {reprlib.repr(values)}")
            return values
        if self.task.has_two_images and "identifier" in record:
            return self.nlvr2_images(record)
        for column in columns:
            if is_missing(path_or_bytes(record.get(column))):
                raise missing(column, record)
        return [record[column] for column in columns]

    def nlvr2_images(self, record: dict) -> list[str]:
        """Return the paths of both images: those of train-10171-0-1 are train-10171-0-img0.png and -img1.png."""
        identifier = filled_text(record, "identifier")
        split, stem = identifier.split("-")[0], identifier.rpartition("-")[0]
        numbered = f"{record['directory']}/" if "directory" in record else ""
        paths = [f"{folder}{stem}-img{{}}.png" for folder in (f"{split}/{numbered}", numbered, f"{split}/", "")]
        found = next((path for path in paths if os.path.isfile(self.path(path.format(0)))), paths[0])
        return [found.format(0), found.format(1)]


def _parsed(record: dict) -> dict:
    return parsed_record(record["json"]) if "json" in record else record


def _within(box: list[float], size: tuple[int, int], column: str) -> list[float]:
    """Clip a box to the image. Rounded corners may be off by up to a pixel."""
    (x0, y0, x1, y1), (width, height) = box, size
    limits = [width, height, width, height]
    cut = [min(max(value, 0.0), float(limit)) for value, limit in zip(box, limits)]
    if has_area(cut) and all(-1 <= value <= limit + 1 for value, limit in zip(box, limits)):
        return cut
    detail = f"[x0, y0, x1, y1] = {box}, the image is {width} x {height}"
    if min(x0, y0, x1 - 1, y1 - 1) >= 0 and x0 + x1 <= width + 1 and y0 + y1 <= height + 1:
        detail += f"; {AS_SIZE}"
    raise BadRowError(f"{column} outside the image" if has_area(box) else f"{column} without area", detail)


# Checks that need the processor


def check_length(num_tokens: int, processor: TripsProcessor, column: str, num_special: int):
    """Raise a `BadRowError` for a text without tokens, or with more than the model takes with `num_special` others."""
    limit = processor.tokenizer.model_max_length
    if num_tokens == 0:
        raise BadRowError(f"{column} without tokens", "the tokenizer knows none of its characters")
    if num_tokens + num_special > limit:
        raise BadRowError(f"more than {limit} tokens", f"{column} has {num_tokens + num_special}")


def check_fit(dataset: Dataset, task: str, processor: TripsProcessor) -> tuple[dict[int, Fault], list[str]]:
    """
    Check that a model can take the texts of a split that it reads or generates.

    Returns:
        `tuple[dict[int, Fault], list[str]]`: Faults by row index, and a description of the texts with an unknown token
        for each column that has some.
    """
    tokenizer = processor.tokenizer
    # Generated texts are not cleaned, and end with [SEP].
    special = {TASKS[task].text: tokenizer.num_special_tokens_to_add(), TASKS[task].written: 1}
    faults: dict[int, Fault] = {}
    unknown = []
    for column in TASKS[task].texts:
        rows = [[texts] if isinstance(texts, str) else texts for texts in column_of(dataset, column)]
        different = list(dict.fromkeys(text for texts in rows for text in texts))
        cleaned = processor.clean_texts(different) if column == TASKS[task].text else different
        tokens = tokenizer(cleaned, add_special_tokens=False, verbose=False)["input_ids"] if different else []
        lengths = dict(zip(different, map(len, tokens)))
        for place, (texts, source) in enumerate(zip(rows, column_of(dataset, "source"))):
            try:
                for text in texts:
                    check_length(lengths[text], processor, column, special[column])
            except BadRowError as error:
                faults.setdefault(place, Fault(source, error.reason, error.detail))
        if odd := [text for text, ids in zip(different, tokens) if tokenizer.unk_token_id in ids]:
            what, examples = column if column.endswith("s") else f"{column}s", ", ".join(map(repr, odd[:3]))
            unknown.append(f"{len(odd)} different {what} hold words that the tokenizer does not know, e.g. {examples}")
    return faults, unknown


def with_fitting_texts(data: DatasetDict, task: str, processor: TripsProcessor, skip: bool) -> DatasetDict:
    """
    Return the rows that pass [`check_fit`], and warn of unknown words.

    Args:
        data (`DatasetDict`): Splits of the task.
        task (`str`)
        processor (`TripsProcessor`)
        skip (`bool`): Whether to skip other rows with a warning that counts them, instead of raising an error.

    Raises:
        `ValueError`: Some rows do not fit and `skip` is off. The message names the first few.
    """
    fitting = {}
    for split, dataset in data.items():
        faults, unknown = check_fit(dataset, task, processor)
        settle([faults[place] for place in sorted(faults)], split, len(dataset), skip)
        fitting[split] = dataset.select([place for place in range(len(dataset)) if place not in faults])
        for line in unknown:
            logger.warning(f"{split}: {line}.")
    return DatasetDict(fitting)
