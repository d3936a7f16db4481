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
from trips_examples.data.images import (
    check_image,
    column_of,
    path_or_bytes,
    stored_image,
    texts_of_column,
    without_decoding,
)
from trips_examples.data.records import parsed_record, read_records
from trips_examples.data.source import BUNDLED, SPLIT_OPTIONS, DataArguments
from trips_examples.data.tasks import (
    TASKS,
    BadRowError,
    Fault,
    Task,
    filled_text,
    is_missing,
    list_of,
    missing,
    settle,
    text_of,
)


ROWS_PER_PROCESS = 2000  # a data set of fewer rows is checked by one process
RECORD = Features({"row": Value("int64"), "json": Value("string")})
_TEXT = Value("string")
# The origin of a row, its fault, and the ids, the contents (paths or hashes) and the versions of its images.
CHECKED = {
    "source": _TEXT,
    "reason": _TEXT,
    "detail": _TEXT,
    "ids": [_TEXT],
    "contents": [_TEXT],
    "stamps": [_TEXT],
}
LEAST_SIDE = 0.01  # of a box, in pixels


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
        reader = RowReader(TASKS[task], part, root, patch_size, source.own_columns)
        data[split], faults_of_split = reader.rows_and_faults(records)
        if faults is None:
            settle(faults_of_split, part, len(records), source.skip_bad_rows)
        else:
            faults += faults_of_split
        if len(data[split]) == 0:
            needed = f"needed are the columns {TASKS[task].needs}; for other names, --columns image=photo"
            fault = Fault(part, "no row that can be used", needed)
            if faults is None:
                raise ValueError(f"{fault}.")
            faults.append(fault)
    return DatasetDict(data)


def _bundled(task: str, source: DataArguments, seed: int) -> DatasetDict:
    features = TASKS[task].features
    data = {}
    for split, num_scenes in source.num_scenes.items():
        records = busy_records(task, split, num_scenes, source.grid, seed)
        reader = RowReader(TASKS[task], f"{BUNDLED} {split}", "")
        rows: list[dict] = []
        bar = tqdm(records, desc=f"Drawing scenes ({split})", unit=" rows", delay=2)
        for number, record in enumerate(bar, start=1):
            rows += reader.rows(f"{reader.name} row {number}", record)
        columns = {column: [row[column] for row in rows] for column in features}
        data[split] = Dataset.from_dict(columns, features=features)
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
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():  # by save_to_disk
        table = load_from_disk(name)
        if isinstance(table, Dataset):
            table = DatasetDict(train=table)
    else:
        table = load_dataset(name, source.dataset_config_name)
    defaults = {"train", "validation"} & table.keys() if "train" in table else {"validation"}
    parts = {split: part or split for split, part in source.splits.items() if part or split in defaults}
    unknown = set(parts.values()) - table.keys()
    if unknown:
        raise ValueError(f"{name} has no split {sorted(unknown)}, only {sorted(table)}. Choose with {SPLIT_OPTIONS}.")
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
        cause = error.__cause__
        message = f"{file} cannot be read: {cause or error}. Repair or convert it."
        if type(cause) is ValueError:  # of `read_records`
            message = str(cause)
        raise ValueError(message) from error  # `raise cause` would make a circle of causes


def _numbered_json(file: Path, task: str, stamp: str) -> Iterator[dict]:
    """Yield the records of a file. `stamp` distinguishes its versions in the cache."""
    row = None
    for row, record in read_records(file):
        yield {"row": row, "json": record if isinstance(record, str) else json.dumps(record)}
    if row is None:
        raise ValueError(f"{file} has no rows. It needs the columns {TASKS[task].needs}.")


# Rows of records


def stamp_of(path: str | Path) -> str:
    """Return a path with the time and size of its file, which tell versions of the file apart."""
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(path)
        return f"{path} {status.st_mtime_ns}:{status.st_size}"
    return f"{path} missing"


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
    columns: dict[str, str] = field(default_factory=dict)  # own names by those of the task
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # of the images so far: each is decoded once

    def rows_and_faults(self, records: Dataset) -> tuple[Dataset, list[Fault]]:
        """Return the rows that can be used, and the faults of the others."""
        if len(records) == 0:
            raise ValueError(f"{self.name} has no rows. It needs the columns {self.task.needs}.")
        records = without_decoding(records)
        checked = self.checked(records)
        if self.has_changed_images(checked):  # since the result was cached
            checked = self.checked(records, load_from_cache_file=False)
        good = []
        faults = []
        content_of: dict[str, str] = {}
        columns = (column_of(checked, name) for name in ("source", "reason", "detail", "ids", "contents"))
        for place, (source, reason, detail, ids, contents) in enumerate(zip(*columns)):
            for image_id, content in zip(ids or (), contents or ()):
                first_content = content_of.setdefault(image_id, content)
                if first_content != content:
                    reason = "image_id of two images"
                    detail = f"{image_id}: {first_content} and {content}"
            if reason is None:
                good.append(place)
            else:
                faults.append(Fault(source, reason, detail))
        rows = checked.select_columns(list(self.task.features))
        if len(good) < len(rows):
            rows = rows.select(good)
        return rows, faults

    def checked(self, records: Dataset, load_from_cache_file: bool | None = None) -> Dataset:
        """Return the rows and the bad ones of records, with the columns `CHECKED`."""
        num_processes = min(os.cpu_count() or 1, len(records) // ROWS_PER_PROCESS)
        settings = (self.task, self.name, self.image_root, self.patch_size, self.columns, __version__)
        return records.map(
            self.rows_of_batch,
            batched=True,
            batch_size=100,
            with_indices=True,
            remove_columns=records.column_names,
            features=Features({**self.task.features, **CHECKED}),
            num_proc=num_processes if num_processes > 1 else None,
            load_from_cache_file=load_from_cache_file,
            new_fingerprint=Hasher.hash((records._fingerprint, settings)),
            desc=f"Checking {self.name}",
        )

    def has_changed_images(self, checked: Dataset) -> bool:
        """Return whether a file of an image is another one than when its row was checked."""
        stamps: set[str] = set()
        for stamps_of_row in column_of(checked, "stamps"):
            stamps.update(stamps_of_row)
        return any(stamp != stamp_of(stamp.rpartition(" ")[0]) for stamp in stamps)

    def rows_of_batch(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows: list[dict] = []
        for index, *values in zip(indices, *batch.values()):
            record = dict(zip(batch, values))
            source = f"{self.name} row {record.get('row', index + 1)}"
            stamps: list[str] = []
            try:
                if "json" in record:
                    record = parsed_record(record["json"])
                record |= {name: record.get(own) for name, own in self.columns.items()}
                stamps = self.stamps(record)
                found = self.rows(source, record)
            except BadRowError as error:
                found = [{"source": source, "reason": error.reason, "detail": error.detail}]
            rows += [{**row, "stamps": stamps} for row in found]
        columns = {**self.task.features, **CHECKED}
        return {name: [row.get(name) for row in rows] for name in columns}

    def stamps(self, record: dict) -> list[str]:
        """Return the stamps of the files of a record's images."""
        stamps = []
        with contextlib.suppress(BadRowError):  # `rows` says what is wrong
            for value in self.image_values(record):
                path = path_or_bytes(value)
                if isinstance(path, str):
                    stamps.append(stamp_of(self.path(path)))
        return stamps

    def rows(self, source: str, record: dict) -> list[dict]:
        """Return the rows of a record, with the `ids` and the `contents` (paths or hashes) of its images."""
        rows = self.task.read_texts(record)
        found = [self.found(value) for value in self.image_values(record)]
        images = [image for image, _, _ in found]
        contents = [content for _, content, _ in found]
        ids = self.ids(record, contents)
        shared: dict[str, Any] = {"source": source, "ids": ids, "contents": contents}
        if self.task.has_two_images:
            shared["images"] = images
            shared["image_ids"] = ids
        else:
            shared["image"] = images[0]
            shared["image_id"] = ids[0]
        if "question_id" in self.task.features:
            question_id = text_of(record.get("question_id"), "question_id")
            shared["question_id"] = question_id or source.rpartition(" ")[2]
        _, _, size = found[0]
        for row in rows:
            for column in ("box", "region"):
                if row.get(column):
                    row[column] = _within(row[column], size, column)
        return [{**row, **shared} for row in rows]

    def ids(self, record: dict, contents: list[str]) -> list[str]:
        """Return the ids of a record's images: the given ones, or else what identifies their contents."""
        given = record.get("image_ids") if self.task.has_two_images else [record.get("image_id")]
        if is_missing(given):
            return contents
        given = list_of(given, "image_ids")
        if len(given) != len(contents):
            raise BadRowError(f"not {len(contents)} image_ids", reprlib.repr(given))
        return [text_of(value, "image_id") or content for value, content in zip(given, contents)]

    def found(self, value: Any) -> tuple[dict, str, tuple[int, int]]:
        """Return an image as `datasets.Image` stores it, what identifies its content, and its (width, height)."""
        value = path_or_bytes(value)
        if isinstance(value, bytes):
            content = hashlib.blake2b(value, digest_size=16).hexdigest()
        else:
            content = self.path(value)
            value = content
        if content not in self.sizes:
            self.sizes[content] = check_image(value, self.patch_size)
        return stored_image(value), content, self.sizes[content]

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


def _within(box: list[float], size: tuple[int, int], column: str) -> list[float]:
    """Clip a box to the image. Rounded corners may be off by up to a pixel."""
    x0, y0, x1, y1 = box
    width, height = size
    detail = f"[x0, y0, x1, y1] = {box}, the image is {width} x {height}"
    has_corner_inside = x0 >= 0 and y0 >= 0 and x1 >= 1 and y1 >= 1
    if has_corner_inside and x0 + x1 <= width + 1 and y0 + y1 <= height + 1:
        detail += "; as [x, y, width, height] it is inside: give [x, y, x + width, y + height]"
    if x1 - x0 < LEAST_SIDE or y1 - y0 < LEAST_SIDE:
        raise BadRowError(f"{column} without area", detail)
    limits = [float(width), float(height)] * 2
    is_near = all(-1 <= value <= limit + 1 for value, limit in zip(box, limits))
    clipped = [min(max(value, 0.0), limit) for value, limit in zip(box, limits)]
    left, top, right, bottom = clipped
    if not is_near or right - left < LEAST_SIDE or bottom - top < LEAST_SIDE:
        raise BadRowError(f"{column} outside the image", detail)
    return clipped


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
    sources = column_of(dataset, "source")
    faults: dict[int, Fault] = {}
    for column in TASKS[task].texts:
        is_read = column == TASKS[task].text  # written texts are not cleaned, and end with [SEP]
        num_special = tokenizer.num_special_tokens_to_add() if is_read else 1
        different = list(dict.fromkeys(texts_of_column(dataset, column)))
        if not different:
            continue
        cleaned = processor.clean_texts(different) if is_read else different
        token_ids = tokenizer(cleaned, add_special_tokens=False, verbose=False)["input_ids"]
        length_of = {text: len(tokens) for text, tokens in zip(different, token_ids)}
        for place, cell in enumerate(column_of(dataset, column)):
            texts = [cell] if isinstance(cell, str) else cell
            try:
                for text in texts:
                    check_length(length_of[text], processor, column, num_special)
            except BadRowError as error:
                faults.setdefault(place, Fault(sources[place], error.reason, error.detail))
    return faults


def with_fitting_texts(data: DatasetDict, task: str, processor: TripsProcessor, skip: bool) -> DatasetDict:
    """Return the rows of all splits that pass [`check_fit`]. The others are skipped, or are an error, see `settle`."""
    fitting = {}
    for split, dataset in data.items():
        faults = check_fit(dataset, task, processor)
        settle([faults[place] for place in sorted(faults)], split, len(dataset), skip)
        good = [place for place in range(len(dataset)) if place not in faults]
        if not good:
            raise ValueError(f"No row of the {split} split has texts that fit. The lines above say why.")
        fitting[split] = dataset.select(good)
    return DatasetDict(fitting)
