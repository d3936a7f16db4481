"""Records of files: JSON, JSONL, CSV, Parquet, and the annotation files of public data sets.

`datasets.load_dataset` is used for tables that hold images. It would shift the columns of a CSV file with unquoted
commas, convert cells such as `none` and `01`, and reject a whole file for one invalid line, so texts are read here.

Public files are recognized by their content and converted to the columns of `load_task_dataset`:

| Data set | File | Task |
|---|---|---|
| VQAv2 | questions, with the file of annotations beside it | `"vqa"` |
| COCO | `captions_train2014.json` | `"captions"` |
| COCO, Flickr8k, Flickr30k as split by Karpathy | `dataset_coco.json` | `"captions"` |
| NLVR2 | `train.json` | `"nlvr2"` |
| RefCOCO, RefCOCO+, RefCOCOg | `refs(unc).p`, with `instances.json` beside it | `"grounding"` |
| ALBEF's lists | captions, questions, NLVR2 | the task of the list |
"""

import codecs
import csv
import io
import json
import pickle
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet

from trips_examples.data.source import AnnotationFile, existing_file
from trips_examples.data.tasks import BadRowError


# A record, or the JSON text of one, with its number from 1: lines of JSONL, items of a list, records of a table.
NumberedRecords = Iterator[tuple[int, dict | str]]

ROWS_PER_READ = 256  # Parquet rows may hold images
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


def parsed_record(record: dict | str) -> dict:
    """Return a record, parsed if it is JSON. Raise a `BadRowError` if it is not a JSON object."""
    if isinstance(record, dict):
        return record
    try:
        value = json.loads(record, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise BadRowError("broken JSON", str(error).partition(";")[0]) from error
    if not isinstance(value, dict):
        raise BadRowError("not a JSON object", reprlib.repr(value))
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    if repeated := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"the key {repeated[0]!r} occurs twice")
    return dict(pairs)


def read_records(file: Path) -> NumberedRecords:
    """
    Yield the records of a JSON, JSONL, CSV or Parquet file.

    Raises:
        `FileNotFoundError`: The file does not exist.
        `ValueError`: The file as a whole cannot be read.
    """
    existing_file(file)
    readers = {".json": _read_json, ".jsonl": _read_json_lines, ".csv": _read_csv, ".parquet": _read_parquet}
    if (suffix := file.suffix.lower()) not in readers:
        raise ValueError(f"{file} ends with {suffix!r}. Convert it to one of {', '.join(readers)}.")
    try:
        yield from readers[suffix](file)
    # pyarrow raises several types of errors, including OSError.
    except (ValueError, RecursionError, csv.Error, pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a valid {suffix} file: {error}. Repair or convert it.") from error


def _read_json(file: Path) -> NumberedRecords:
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    if content.lstrip().startswith(b"["):
        return enumerate(map(json.dumps, json.loads(content, object_pairs_hook=_unique_keys)), start=1)
    return _read_json_lines(file)


def _read_json_lines(file: Path) -> NumberedRecords:
    with file.open(encoding="utf-8-sig") as lines:
        yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _read_csv(file: Path) -> NumberedRecords:
    number = 0
    with file.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines, strict=True)
        try:
            if repeated := [name for name, count in Counter(table.fieldnames or ()).items() if count > 1]:
                raise ValueError(f"the column {repeated[0]!r} occurs twice")
            for number, record in enumerate(table, start=1):
                if None in record:
                    raise ValueError(f"row {number} has more cells than the header; quote cells that have commas")
                if row := next(filter(None, map(_row_within, record.values())), None):
                    raise ValueError(f"a cell of row {number} holds a whole row, {row!r}; correct its quotes")
                yield number, record
        except csv.Error as error:
            raise ValueError(f"row {number + 1}: {error}; correct its quotes") from error


def _row_within(cell: str | None) -> str | None:
    """Return a line of a cell of CSV that has an image file among its cells: a row that stray quotes swallowed."""
    image = re.compile(rf".*\.({'|'.join(IMAGE_SUFFIXES)}) *\"?(,|$)", re.IGNORECASE)
    return next((line for line in (cell or "").splitlines()[1:] if "," in line and image.match(line)), None)


def _read_parquet(file: Path) -> NumberedRecords:
    with pyarrow.parquet.ParquetFile(file) as table:
        yield from enumerate(
            (row for batch in table.iter_batches(ROWS_PER_READ) for row in batch.to_pylist()), start=1
        )


# Public annotation files


def _second_document(file: AnnotationFile, items: str, key: str) -> dict:
    """
    Return the content of a second file.

    Raises:
        `FileNotFoundError`: It does not exist.
        `ValueError`: The first of its `items` has no `key`.
    """
    path = file.second_path
    if not path.is_file():
        raise FileNotFoundError(f"{file.path} needs {path}, which does not exist. Copy or link it there.")
    content = _document(path)
    if content is None or key not in _first(content.get(items)):
        raise ValueError(f"{path} is not valid JSON, or has no {items} with {key}. Give the official file.")
    return content


def read_annotations(file: AnnotationFile, task: str) -> NumberedRecords:
    """
    Yield the records of a file in any of the formats above, as `read_records` does.

    Raises:
        `FileNotFoundError`: The file or its second file does not exist.
        `ValueError`: The file cannot be read, belongs to another task, or lacks the split.
    """
    existing_file(file.path)
    is_pickle = file.path.suffix.lower() in (".p", ".pkl", ".pickle")
    content = read_plain_pickle(file.path) if is_pickle else _document(file.path)
    public = next((each for each in _FORMATS if each.matches(content)), None)
    if public is None and is_pickle:
        raise ValueError(f"{file.path} is a pickle, and not of RefCOCO's refs: convert it to JSON lines.")
    if public is not None and public.task != task:
        raise ValueError(f"{file.path} is {public.name} for the task {public.task!r}, not {task!r}.")
    if file.split is not None and (public is None or not public.has_splits):
        raise ValueError(f"{file.path} has no splits: leave out {file.split_option} {file.split}.")
    if public is None:
        yield from read_records(file.path)
        return
    number = 0
    try:
        for number, record in public.read(content, file):
            yield number, record
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file.path} is {public.name}, but incomplete after row {number}: {type(error).__name__}: {error}."
        ) from error


class _PublicFormat(NamedTuple):
    name: str
    task: str
    items: str | None  # key of the list of items; None if the file is a list
    keys: set[str]  # of an item
    read: Callable[[Any, AnnotationFile], NumberedRecords]
    has_splits: bool

    def matches(self, content: Any) -> bool:
        if self.items is not None:
            content = content.get(self.items) if isinstance(content, dict) else None
        return self.keys <= _first(content).keys()


def _first(items: Any) -> dict:
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}


def _document(file: Path) -> dict | None:
    """Return the content of a file that is one JSON object, or None."""
    if file.suffix.lower() != ".json":
        return None
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return json.loads(content) if content.lstrip().startswith(b"{") else None
    except (ValueError, RecursionError):
        return None  # JSON lines, or an error that reading the records reports


def _read_vqa(document: dict, file: AnnotationFile) -> NumberedRecords:
    annotations = _second_document(file, "annotations", "answers")["annotations"]
    by_question = {each["question_id"]: each for each in annotations}
    folder = document["data_subtype"].replace("test-dev", "test")
    for number, question in enumerate(document["questions"], start=1):
        name = f"COCO_{folder}_{int(question['image_id']):012d}.jpg"
        record = {column: question[column] for column in ("image_id", "question_id", "question")}
        annotation = by_question.get(question["question_id"], {})
        record |= {column: annotation.get(column) for column in ("answers", "question_type", "answer_type")}
        yield number, {"image": file.first_path(f"{folder}/{name}", name), **record}


def _read_coco_captions(document: dict, file: AnnotationFile) -> NumberedRecords:
    images = {image["id"]: image for image in document["images"]}
    for number, annotation in enumerate(document["annotations"], start=1):
        path = _coco_path(images[annotation["image_id"]], file)
        yield number, {"image": path, "image_id": annotation["image_id"], "caption": annotation["caption"]}


def _coco_path(image: dict, file: AnnotationFile) -> str:
    """Return the path of an image: in a folder such as `train2014`, from its name or URL, or without one."""
    name, address = image["file_name"], image.get("coco_url", "").split("/")
    folder = name.split("_")[1] if name.startswith("COCO_") else address[-2] if len(address) > 1 else "."
    return file.first_path(f"{folder}/{name}", name)


def _read_karpathy(document: dict, file: AnnotationFile) -> NumberedRecords:
    # `restval` holds the remaining validation images of COCO, which are commonly used for training.
    items = file.of_split(document["images"], lambda image: {"restval": "train"}.get(image["split"], image["split"]))
    for number, image in items:
        name, captions = image["filename"], [sentence["raw"] for sentence in image["sentences"]]
        path, image_id = file.first_path(f"{image.get('filepath', '.')}/{name}", name), image.get("imgid")
        yield number, {"image": path, "image_id": image.get("cocoid", image_id), "captions": captions}


class _PlainUnpickler(pickle._Unpickler):  # the one in C allocates a table of the size that a memo index claims
    """An unpickler that refuses all classes and functions, and therefore code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not plain data")


def read_plain_pickle(file: Path) -> Any:
    """
    Read a pickle of lists, dictionaries, texts and numbers. No code in it is executed.

    Raises:
        `ValueError`: The file holds other objects or is not a pickle.
    """
    try:
        return _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="utf-8").load()
    # A broken pickle can raise any type of error.
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read: {error}. Only pickles of lists, dicts, texts and numbers are supported."
        ) from error


def _read_refs(refs: list, file: AnnotationFile) -> NumberedRecords:
    content = _second_document(file, "annotations", "bbox")
    images, annotations = ({each["id"]: each for each in content[name]} for name in ("images", "annotations"))
    for number, ref in file.of_split(refs, lambda ref: ref["split"]):
        x, y, width, height = annotations[ref["ann_id"]]["bbox"]
        path = _coco_path(images[ref["image_id"]], file)
        record = {"image": path, "image_id": ref["image_id"], "box": [x, y, x + width, y + height]}
        for sentence in ref["sentences"]:
            yield number, {**record, "expression": sentence["sent"], "question_id": sentence["sent_id"]}


_FORMATS = [
    _PublicFormat("RefCOCO's refs", "grounding", None, {"ref_id", "ann_id", "split", "sentences"}, _read_refs, True),
    _PublicFormat("VQAv2's questions", "vqa", "questions", {"question", "question_id", "image_id"}, _read_vqa, False),
    _PublicFormat("COCO's captions", "captions", "annotations", {"caption"}, _read_coco_captions, False),
    _PublicFormat("Karpathy's split", "captions", "images", {"sentences", "filename", "split"}, _read_karpathy, True),
]
