"""Checking of rows: of records when they are read, and of texts and boxes when the processor is known."""

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
from trips_examples.data.images import check_image, column_of, image_size, path_or_bytes, without_decoding
from trips_examples.data.tasks import (
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
CHECKED = {"reason": Value("string"), "detail": Value("string"), "contents": [Value("string")]}


def stamp_of(path: str | Path) -> str:
    """Return a path with the time and size of its file, for fingerprints."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return f"{path} -"
    return f"{path} {status.st_mtime_ns} {status.st_size}"


@dataclass
class RowMaker:
    """
    Converter from the records of a split to checked rows, with `reason` and `detail` of the fault of a bad row, and
    `contents`, which identifies the images: their paths, or hashes of their bytes.

    Args:
        task (`Task`)
        name (`str`): Name of the split, for `source` and errors.
        image_root (`str`): Folder that paths are relative to.
        patch_size (`int`): Side of the model's patches in pixels.
        checks_images (`bool`): Whether to decode the images.
    """

    task: Task
    name: str
    image_root: str
    patch_size: int = 1
    checks_images: bool = True

    def __post_init__(self):
        self.sizes: dict[str, tuple[int, int]] = {}  # each image is decoded once

    def rows_and_faults(self, records: Dataset) -> tuple[Dataset, list[Fault]]:
        """Return the rows that can be used, and the faults of the others."""
        records = without_decoding(records)
        features = Features({**self.task.features, **CHECKED})
        if len(records) == 0:
            return Dataset.from_dict({name: [] for name in self.task.features}, features=self.task.features), []
        num_proc = min(os.cpu_count() or 1, len(records) // ROWS_PER_PROCESS)
        rows = records.map(
            self.rows_of_batch,
            batched=True,
            batch_size=100,
            with_indices=True,
            remove_columns=records.column_names,
            features=features,
            num_proc=num_proc if num_proc > 1 else None,
            new_fingerprint=self.fingerprint(records),
            desc=f"Checking {self.name}",
        )
        faults = {
            place: Fault(*fault)
            for place, fault in enumerate(zip(*(column_of(rows, name) for name in ("source", "reason", "detail"))))
            if fault[1]
        }
        faults |= self.ids_of_two_images(rows, faults)
        good = [place for place in range(len(rows)) if place not in faults]
        rows = rows if len(good) == len(rows) else rows.select(good)
        return rows.select_columns(list(self.task.features)), [faults[place] for place in sorted(faults)]

    def fingerprint(self, records: Dataset) -> str:
        """Hash the records, the settings and the versions of the image files, so that repaired images are checked."""
        stamps = hashlib.blake2b(digest_size=16)
        names = {"json", "image", "images", "left_image", "right_image"} & {*records.column_names}
        if not any("binary" in str(records.features.arrow_schema.field(name).type) for name in names):
            for record in records.select_columns(sorted(names)):
                for path in self.paths(record):
                    stamps.update(stamp_of(path).encode("utf-8", "backslashreplace"))
        settings = (self.task, self.name, self.image_root, self.patch_size, __version__)
        return Hasher.hash((records._fingerprint, settings, stamps.hexdigest()))

    def paths(self, record: dict) -> list[str]:
        try:
            return [self.path(value) for value in _image_values(_parsed(record), self.task)]
        except BadRowError:
            return []

    def rows_of_batch(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = []
        for index, *values in zip(indices, *batch.values()):
            record = dict(zip(batch, values))
            rows += self.rows(record.get("row", index + 1), record)
        return {name: [row.get(name) for row in rows] for name in (*self.task.features, *CHECKED)}

    def rows(self, number: int, record: dict) -> list[dict]:
        """Return the rows of a record, or one with its fault."""
        source = f"{self.name} row {number}"
        try:
            record = _parsed(record)
            texts = self.task.read_texts(record)
            images, contents, sizes = zip(*map(self.found, _image_values(record, self.task)))
            ids = self.image_ids(record, contents)
            shared = {"source": source, "contents": list(contents)}
            if self.task.image_column == "image":
                shared |= {"image": images[0], "image_id": ids[0]}
            else:
                shared |= {"images": list(images), "image_ids": ids}
            if "question_id" in self.task.features:
                given = record.get("question_id", record.get("identifier"))
                shared["question_id"] = text_of(given, "question_id") or str(number)
            for column in ("box", "region"):
                for row in texts:
                    if row.get(column) is not None and sizes[0] is not None:
                        row[column] = _within(row[column], sizes[0], column)
            return [{**shared, **row} for row in texts]
        except BadRowError as error:
            return [{"source": source, "reason": error.reason, "detail": error.detail}]

    def found(self, value: Any) -> tuple[dict, str, tuple[int, int] | None]:
        """Return an image as `datasets.Image` stores it, what identifies its content, and its (width, height)."""
        value = path_or_bytes(value)
        is_path = not isinstance(value, bytes)
        content = os.path.normpath(self.path(value)) if is_path else hashlib.blake2b(value, digest_size=16).hexdigest()
        if self.checks_images and content not in self.sizes:
            self.sizes[content] = check_image(content if is_path else value, self.patch_size)
        image = {"bytes": None, "path": content} if is_path else {"bytes": value, "path": None}
        return image, content, self.sizes.get(content)

    def path(self, value: Any) -> str:
        """Return the path of an image, the first that exists of a tuple of possible ones."""
        values = value if isinstance(value, tuple) else (value,)
        paths = [os.path.join(self.image_root, filled_text({"image": value}, "image")) for value in values]
        return next(filter(os.path.isfile, paths), paths[0]) if len(paths) > 1 else paths[0]

    def image_ids(self, record: dict, contents: tuple[str, ...]) -> list[str]:
        given = [record.get("image_id")]
        if self.task.image_column == "images":
            given = record.get("image_ids")
            given = [None] * len(contents) if is_missing(given) else list_of(given, "image_ids")
        if len(given) != len(contents):
            raise BadRowError(f"not {len(contents)} image_ids", reprlib.repr(given))
        return [text_of(value, "image_id") or content for value, content in zip(given, contents)]

    def ids_of_two_images(self, rows: Dataset, faults: dict[int, Fault]) -> dict[int, Fault]:
        """Return the faults of rows whose `image_id` an earlier row has for another image."""
        column = self.task.image_column.replace("image", "image_id")
        first: dict[str, str] = {}
        found = {}
        columns = (column_of(rows, name) for name in (column, "contents", "source"))
        for place, (ids, contents, source) in enumerate(zip(*columns)):
            if place in faults:
                continue
            for image_id, content in zip([ids] if isinstance(ids, str) else ids, contents):
                if (other := first.setdefault(image_id, content)) != content:
                    found[place] = Fault(source, "image_id of two images", f"{image_id}: {other} and {content}")
        return found


def _parsed(record: dict) -> dict:
    return parsed_record(record["json"]) if "json" in record else record


def _image_values(record: dict, task: Task) -> list:
    """Return the images of a record. Raise a `BadRowError` if one is missing."""
    columns = ["image"]
    if task.image_column == "images":
        if not is_missing(values := record.get("images")):
            values = list_of(values, "images")
            if len(values) != 2:
                raise BadRowError("not two images", reprlib.repr(values))
            if any(map(is_missing, values)):
                raise BadRowError("no image", f"images is {reprlib.repr(values)}")
            return values
        if "identifier" in record:
            return _nlvr2_paths(record)
        columns = ["left_image", "right_image"]
    for column in columns:
        if is_missing(path_or_bytes(record.get(column))):
            raise missing(column, record)
    return [record[column] for column in columns]


def _nlvr2_paths(record: dict) -> list[tuple[str, ...]]:
    """Return the possible paths of both images. Those of train-10171-0-1 are train-10171-0-img0.png and -img1.png."""
    identifier = filled_text(record, "identifier")
    split, stem = identifier.split("-")[0], identifier.rpartition("-")[0]
    numbered = f"{record['directory']}/" if "directory" in record else ""
    folders = dict.fromkeys([f"{split}/{numbered}", numbered, f"{split}/", ""])
    return [tuple(f"{folder}{stem}-img{side}.png" for folder in folders) for side in (0, 1)]


def _within(box: list[float], size: tuple[int, int], column: str) -> list[float]:
    """Clip a box to the image. Rounded corners may be off by up to a pixel."""
    limits = [*size, *size]
    cut = [min(max(value, 0.0), float(limit)) for value, limit in zip(box, limits)]
    if not all(-1 <= value <= limit + 1 for value, limit in zip(box, limits)) or not has_area(cut):
        detail = f"[x0, y0, x1, y1] = {box}, the image is {size[0]} x {size[1]}"
        raise BadRowError(f"{column} outside the image", detail)
    return cut


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
    Check that a model can take the texts of a split that it reads or generates, and sees the boxes.

    Returns:
        `tuple[dict[int, Fault], list[str]]`: Faults by row index, and a description of the texts with an unknown token
        for each column that has some.
    """
    tokenizer = processor.tokenizer
    # Generated texts are not cleaned, and end with [SEP].
    special = {TASKS[task].text: tokenizer.num_special_tokens_to_add(), TASKS[task].written: 1}
    faults: dict[int, Fault] = {}
    unknown = []
    if task == "grounding":
        faults |= _hidden_boxes(dataset, processor)
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


def _hidden_boxes(dataset: Dataset, processor: TripsProcessor) -> dict[int, Fault]:
    """
    Return the faults of rows whose box is outside the center crop of the processor, by row index. Processors without a
    center crop have none.
    """
    if not getattr(processor.image_processor, "do_center_crop", False):
        return {}
    faults = {}
    for place, row in enumerate(without_decoding(dataset)):
        try:
            processor.encode_boxes([row["box"]], [image_size(row)])
        except ValueError:
            faults[place] = Fault(row["source"], "box outside the center crop", f"[x0, y0, x1, y1] = {row['box']}")
    return faults


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
