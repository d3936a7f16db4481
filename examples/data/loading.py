"""
Loading of data sets in one schema per task: files, data sets on the Hub or on disk, and bundled synthetic data. Rows
are checked when they are read, and their texts when the processor is known.
"""

import contextlib
import hashlib
import json
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from accelerate.utils import tqdm
from datasets import Dataset, DatasetDict, Features, NamedSplit, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from modeling_trips import TripsProcessor, __version__
from trips_examples.data.busy_scenes import busy_records
from trips_examples.data.images import check_image, column_of, path_or_bytes, without_decoding
from trips_examples.data.records import parsed_record, read_records
from trips_examples.data.source import BUNDLED, SPLIT_OPTIONS, DataArguments
from trips_examples.data.tasks import (
    TASKS,
    BadRowError,
    Fault,
    Task,
    filled_text,
    is_missing,
    likely_task,
    list_of,
    missing,
    settle,
    text_of,
)


ROWS_PER_PROCESS = 2000  # a data set of fewer rows is checked by one process
RECORD = Features({"row": Value("int64"), "json": Value("string")})
_TEXT = Value("string")
CHECKED = {"source": _TEXT, "reason": _TEXT, "detail": _TEXT, "ids": [_TEXT], "contents": [_TEXT]}


def load_task_dataset(
    task: str,
    source: DataArguments | None = None,
    patch_size: int = 1,
    seed: int = 0,
    faults: list[Fault] | None = None,
) -> DatasetDict:
    """
    Load the data of a task, with the same columns from any source. Rows are checked, and images decoded once. The
    datasets library caches the result until a file or an image changes.

    Args:
        task (`str`): `"vqa"`, `"captions"` (for retrieval, captioning and pre-training), `"nlvr2"` or `"grounding"`.
        source ([`DataArguments`], *optional*): Source of the data. Default: the bundled scenes. With `skip_bad_rows`,
            rows that cannot be used are skipped, with a warning that counts them, instead of raising an error.
        patch_size (`int`, *optional*, defaults to 1): Shortest usable side of an image in pixels.
        seed (`int`, *optional*, defaults to 0): Seed of the scenes.
        faults (`list[Fault]`, *optional*): List that receives the faults. Bad rows are then left out.

    Returns:
        `DatasetDict`: Splits with the columns of `TASKS[task].features`.

    Raises:
        `ValueError`: Rows cannot be used (the message names the first few), or the arguments contradict each other.
        `FileNotFoundError`: A file or `image_root` does not exist.
    """
    source = source or DataArguments()
    source.check(task)
    if source.is_bundled:
        return _bundled(task, source, seed)
    data = {}
    for split, part, root, records in _tables(task, source):
        reader = RowReader(TASKS[task], part, root, patch_size)
        data[split], faults_of_split = reader.rows_and_faults(records)
        if faults is None:
            settle(faults_of_split, part, len(records), source.skip_bad_rows)
        else:
            faults += faults_of_split
        if len(data[split]) == 0:
            needed = f"needed are the columns {TASKS[task].needs}"
            other_task = likely_task(_columns(records))
            if other_task not in (None, task):
                needed = f"{needed}; this looks like --task {other_task}"
            fault = Fault(part, "no row that can be used", needed)
            if faults is None:
                raise ValueError(f"{fault}.")
            faults.append(fault)
    return DatasetDict(data)


def _columns(records: Dataset) -> list[str]:
    """Return the columns of records, of JSON the keys of the first one."""
    if records.features != RECORD:
        return records.column_names
    try:
        return list(parsed_record(records[0]["json"]))
    except BadRowError:
        return []


def _bundled(task: str, source: DataArguments, seed: int) -> DatasetDict:
    data = {}
    for split, number in source.num_scenes.items():
        records = busy_records(task, split, number, source.grid, seed)
        records = tqdm(records, desc=f"Drawing scenes ({split})", unit=" rows", delay=2)
        reader = RowReader(TASKS[task], f"{BUNDLED} {split}", "")
        numbered = enumerate(records, start=1)
        rows = [row for number, record in numbered for row in reader.rows(f"{reader.name} row {number}", record)]
        columns = {column: [row[column] for row in rows] for column in TASKS[task].features}
        data[split] = Dataset.from_dict(columns, features=TASKS[task].features)
    return DatasetDict(data)


def _tables(task: str, source: DataArguments) -> Iterator[tuple[str, str, str, Dataset]]:
    """
    Yield each split, its name in messages, the folder that paths of images are relative to, and its records. A data
    set without a training split is for evaluation. Its test split must be requested by name, because public test
    splits often lack answers.
    """
    if source.files:
        for split, file in source.files.items():
            yield split, file.name, source.image_root or str(file.parent), _records(file, task, split)
        return
    name = source.dataset_name
    if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):  # by save_to_disk
        table = load_from_disk(name)
        table = DatasetDict(train=table) if isinstance(table, Dataset) else table
    else:
        table = load_dataset(name, source.dataset_config_name)
    defaults = {"train", "validation"} & table.keys() if "train" in table else {"validation"}
    parts = {split: part or split for split, part in source.splits.items() if part or split in defaults}
    if missing := {*parts.values()} - table.keys():
        raise ValueError(f"{name} has no split {sorted(missing)}, only {sorted(table)}. Choose with {SPLIT_OPTIONS}.")
    for split, part in parts.items():
        yield split, f"{name} {part}", "", table[part]


def _records(file: Path, task: str, split: str) -> Dataset:
    """Return the records of a file: its columns if it is Parquet, else `RECORD`."""
    try:
        if file.suffix.lower() == ".parquet":
            return load_dataset("parquet", data_files={split: str(file)}, split=split)
        given = {"file": file, "task": task, "stamp": stamp_of(file.absolute())}
        return Dataset.from_generator(_numbered_json, features=RECORD, gen_kwargs=given, split=NamedSplit(split))
    except (DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        if type(error.__cause__) is ValueError:  # of `read_records`
            raise error.__cause__ from None
        raise ValueError(f"{file} cannot be read: {error.__cause__ or error}. Repair or convert it.") from error


def _numbered_json(file: Path, task: str, stamp: str) -> Iterator[dict]:
    """Yield the records of a file. `stamp` distinguishes its versions in the cache."""
    row = None
    for row, record in read_records(file):
        yield {"row": row, "json": record if isinstance(record, str) else json.dumps(record)}
    if row is None:
        raise ValueError(f"{file} has no rows. It needs the columns {TASKS[task].needs}.")


# Rows of records


def stamp_of(path: str | Path) -> str:
    """Return a path with the time and size of its file, for fingerprints."""
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(path)
        return f"{path} {status.st_mtime_ns} {status.st_size}"
    return f"{path} -"


@dataclass
class RowReader:
    """
    Converter from the records of a split to checked rows. `name` names the split in `source` and errors, paths are
    relative to `image_root`, and images with a side below `patch_size` pixels cannot be used.
    """

    task: Task
    name: str
    image_root: str
    patch_size: int = 1
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # of the images so far: each is decoded once

    def rows_and_faults(self, records: Dataset) -> tuple[Dataset, list[Fault]]:
        """Return the rows that can be used, and the faults of the others."""
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
        rows = checked.select_columns(list(self.task.features))
        return rows if len(good) == len(rows) else rows.select(good), faults

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
        if self.task.has_two_images:
            shared: dict[str, Any] = {"images": list(images), "image_ids": ids}
        else:
            shared = {"image": images[0], "image_id": ids[0]}
        if "question_id" in self.task.features:
            question_id = text_of(record.get("question_id"), "question_id")
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
        if not self.task.has_two_images:
            values = [record.get("image")]
        elif not is_missing(record.get("images")):
            values = list_of(record["images"], "images")
        else:
            values = [record.get("left_image"), record.get("right_image")]
        if self.task.has_two_images and len(values) != 2:
            raise BadRowError("not two images", reprlib.repr(values))
        if any(is_missing(path_or_bytes(value)) for value in values):
            raise missing("image", record)
        return values


def _parsed(record: dict) -> dict:
    return parsed_record(record["json"]) if "json" in record else record


def _within(box: list[float], size: tuple[int, int], column: str) -> list[float]:
    """Clip a box to the image. Rounded corners may be off by up to a pixel."""
    (x0, y0, x1, y1), (width, height) = box, size
    limits = [width, height, width, height]
    cut = [min(max(value, 0.0), float(limit)) for value, limit in zip(box, limits)]
    detail = f"[x0, y0, x1, y1] = {box}, the image is {width} x {height}"
    if min(x0, y0, x1 - 1, y1 - 1) >= 0 and x0 + x1 <= width + 1 and y0 + y1 <= height + 1:
        detail += "; as [x, y, width, height] it is inside: give [x, y, x + width, y + height]"
    if min(x1 - x0, y1 - y0) < 0.01:
        raise BadRowError(f"{column} without area", detail)
    is_near = all(-1 <= value <= limit + 1 for value, limit in zip(box, limits))
    if not is_near or min(cut[2] - cut[0], cut[3] - cut[1]) < 0.01:
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


def check_fit(dataset: Dataset, task: str, processor: TripsProcessor) -> dict[int, Fault]:
    """Return the faults by row index of the texts of a split that a model reads or writes and cannot take."""
    tokenizer = processor.tokenizer
    faults: dict[int, Fault] = {}
    for column in TASKS[task].texts:
        is_read = column == TASKS[task].text  # written texts are not cleaned, and end with [SEP]
        num_special = tokenizer.num_special_tokens_to_add() if is_read else 1
        rows = [[texts] if isinstance(texts, str) else texts for texts in column_of(dataset, column)]
        different = list(dict.fromkeys(text for texts in rows for text in texts))
        cleaned = processor.clean_texts(different) if is_read else different
        tokens = tokenizer(cleaned, add_special_tokens=False, verbose=False)["input_ids"] if different else []
        lengths = dict(zip(different, map(len, tokens)))
        for place, (texts, source) in enumerate(zip(rows, column_of(dataset, "source"))):
            try:
                for text in texts:
                    check_length(lengths[text], processor, column, num_special)
            except BadRowError as error:
                faults.setdefault(place, Fault(source, error.reason, error.detail))
    return faults


def with_fitting_texts(data: DatasetDict, task: str, processor: TripsProcessor, skip: bool) -> DatasetDict:
    """Return the rows of all splits that pass [`check_fit`]. The others are skipped, or are an error, see `settle`."""
    fitting = {}
    for split, dataset in data.items():
        faults = check_fit(dataset, task, processor)
        settle([faults[place] for place in sorted(faults)], split, len(dataset), skip)
        fitting[split] = dataset.select([place for place in range(len(dataset)) if place not in faults])
    return DatasetDict(fitting)
