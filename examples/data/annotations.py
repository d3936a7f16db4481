"""Records of files: JSON, JSONL, CSV, Parquet, and the annotation files of public data sets.

`datasets.load_dataset` is used for tables that hold images. It would shift the columns of a CSV file with unquoted
commas, convert cells such as `none` and `01`, and reject a whole file for one invalid line, so texts are read here.

Public files are recognized by their content and converted to the columns of `load_task_dataset`:

| Data set | File | Task |
|---|---|---|
| VQAv2 | questions, with the file of annotations | `"vqa"` |
| COCO | `captions_train2014.json` | `"captions"` |
| COCO, Flickr8k, Flickr30k as split by Karpathy | `dataset_coco.json` | `"captions"` |
| NLVR2 | `train.json` | `"nlvr2"` |
| RefCOCO, RefCOCO+, RefCOCOg | `refs(unc).p`, with `instances.json` | `"grounding"` |
| ALBEF's lists | captions, questions, NLVR2; RefCOCO with `refs(unc).p` | the task of the list |
"""

import codecs
import csv
import io
import json
import pickle
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from trips_examples.data.source import existing_file
from trips_examples.data.tasks import BadRowError


# A record, or the JSON text of one, with its number from 1: lines of JSONL, items of a list, records of a table.
NumberedRecords = Iterator[tuple[int, dict | str]]

ROWS_PER_READ = 256  # Parquet rows may hold images


def parsed_record(record: dict | str) -> dict:
    """Return a record, parsed if it is JSON. Raise a `BadRowError` if it is not a JSON object."""
    if isinstance(record, dict):
        return record
    try:
        value = json.loads(record)
    except (ValueError, RecursionError) as error:
        raise BadRowError("broken JSON", str(error).partition(";")[0]) from error
    if not isinstance(value, dict):
        raise BadRowError("not a JSON object", reprlib.repr(value))
    return value


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
        return enumerate(map(json.dumps, json.loads(content)), start=1)
    return _read_json_lines(file)


def _read_json_lines(file: Path) -> NumberedRecords:
    with file.open(encoding="utf-8-sig") as lines:
        yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _read_csv(file: Path) -> NumberedRecords:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, record in enumerate(csv.DictReader(lines), start=1):
            if None in record:
                raise ValueError(f"row {number} has more cells than the header; quote cells that have commas")
            yield number, record


def _read_parquet(file: Path) -> NumberedRecords:
    with pyarrow.parquet.ParquetFile(file) as table:
        yield from enumerate(
            (row for batch in table.iter_batches(ROWS_PER_READ) for row in batch.to_pylist()), start=1
        )


# Public annotation files


@dataclass(frozen=True)
class AnnotationFile:
    """
    A file of annotations and the options for reading it.

    Args:
        path (`Path`)
        default_split (`str`): Split to read from a file with several splits: `"train"`, `"val"` or `"test"`.
        split (`str`, *optional*): Replaces `default_split`. A file without splits is then an error.
        annotations (`Path`, *optional*): Second file of VQAv2 and RefCOCO. Default: the file with the official name.
        image_root (`Path`, *optional*): Folder that paths of images are relative to. Default: the folder of the file.
    """

    path: Path
    default_split: str
    split: str | None = None
    annotations: Path | None = None
    image_root: Path | None = None

    @property
    def folder(self) -> Path:
        return self.image_root or self.path.parent

    def option(self, what: str) -> str:
        return f"--{'validation' if self.default_split == 'val' else self.default_split}_{what}"

    def refuse_unused(self, name: str, has_splits: bool, has_second_file: bool):
        """Raise a `ValueError` if a split or a second file is given that this format does not have."""
        if self.split is not None and not has_splits:
            raise ValueError(f"{self.path} is {name}, without splits: leave out {self.option('split')} {self.split}.")
        if self.annotations is not None and not has_second_file:
            option = f"{self.option('annotations')} {self.annotations}"
            raise ValueError(f"{self.path} is {name}, without a second file: leave out {option}.")

    def second_file(self, official_name: str, what: str) -> Path:
        """Return the second file: the one given, or the one with the official name beside this file."""
        file = self.annotations or self.path.with_name(official_name)
        if not file.is_file():
            option = self.option("annotations")
            raise FileNotFoundError(f"{self.path} needs {what}, but {file} does not exist. Give it with {option}.")
        return file

    def of_split(self, items: list[dict], split_of: Callable[[dict], str]) -> list[tuple[int, dict]]:
        """Return the items of the requested split and their numbers in the file."""
        wanted = self.split or self.default_split
        numbered = [(number, item) for number, item in enumerate(items, start=1) if split_of(item) == wanted]
        if not numbered:
            only = ", ".join(f"{split} ({count})" for split, count in Counter(map(split_of, items)).items())
            option = self.option("split")
            raise ValueError(f"{self.path} has no split {wanted!r}, only {only}. Choose one with {option}.")
        return numbered

    def first_path(self, *paths: str) -> str:
        """Return the first of several possible paths of an image that exists, or the first one."""
        return str(next((path for path in map(Path, paths) if (self.folder / path).is_file()), Path(paths[0])))


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
    public = next((each for each in (_REFS, _VQA, _COCO, _KARPATHY) if each.matches(content)), None)
    if public is None and is_pickle:
        raise ValueError(f"{file.path} is a pickle, and not of RefCOCO's refs: convert it to JSON lines.")
    if public is None:
        file.refuse_unused("a list of rows", has_splits=False, has_second_file=task == "grounding")
        yield from read_records(file.path) if file.annotations is None else _read_albef_refs(file)
        return
    if public.task != task:
        raise ValueError(f"{file.path} is {public.name} for the task {public.task!r}, not {task!r}.")
    file.refuse_unused(public.name, public.has_splits, public.has_second_file)
    number = 0
    try:
        for number, record in public.read(content, file):
            yield number, record
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file.path} is {public.name}, but incomplete after row {number}: {type(error).__name__}: {error}."
        ) from error


@dataclass(frozen=True)
class _PublicFormat:
    name: str
    task: str
    items: str | None  # key of the list of items; None if the file is a list
    keys: set[str]  # of an item
    read: Callable[[Any, AnnotationFile], NumberedRecords]
    has_splits: bool = False
    has_second_file: bool = False

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


def _load_json(file: Path, items: str, key: str, what: str) -> dict:
    """Return a second file. Raise a `ValueError` if the first of its items lacks a key."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not a valid JSON file: {error}.") from error
    if not isinstance(content, dict) or key not in _first(content.get(items)):
        raise ValueError(f"{file} has no {key}. Give {what}.")
    return content


def _read_vqa(document: dict, file: AnnotationFile) -> NumberedRecords:
    official_name = file.path.name.replace("OpenEnded_", "").replace("questions", "annotations")
    annotations = file.second_file(official_name, "a file of annotations")
    what = f"the annotations of {file.path} as {file.option('annotations')}"
    content = _load_json(annotations, "annotations", "answers", what)
    by_question = {each["question_id"]: each for each in content["annotations"]}
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


def _read_instances(path: Path, file: AnnotationFile) -> Callable[[dict], dict]:
    """Return a function from a ref to its image and its box in `instances.json`."""
    content = _load_json(path, "annotations", "bbox", "the instances.json of RefCOCO or COCO")
    images, annotations = ({each["id"]: each for each in content[name]} for name in ("images", "annotations"))

    def image_and_box(ref: dict) -> dict:
        x, y, width, height = annotations[ref["ann_id"]]["bbox"]
        path = _coco_path(images[ref["image_id"]], file)
        return {"image": path, "image_id": ref["image_id"], "box": [x, y, x + width, y + height]}

    return image_and_box


def _read_refs(refs: list, file: AnnotationFile) -> NumberedRecords:
    instances = file.second_file("instances.json", "the boxes in instances.json")
    image_and_box = _read_instances(instances, file)
    for number, ref in file.of_split(refs, lambda ref: ref["split"]):
        for sentence in ref["sentences"]:
            yield number, {**image_and_box(ref), "expression": sentence["sent"], "question_id": sentence["sent_id"]}


def _read_albef_refs(file: AnnotationFile) -> NumberedRecords:
    """Yield the records of a list of ALBEF, whose boxes are those of a `ref_id` in the second file."""
    refs = read_plain_pickle(file.annotations)
    if not _REFS.matches(refs):
        raise ValueError(f"{file.annotations} has no refs. {file.option('annotations')} takes refs(unc).p here.")
    refs = {ref["ref_id"]: ref for ref in refs}
    image_and_box = _read_instances(file.annotations.with_name("instances.json"), file)
    for number, text in read_records(file.path):
        record = parsed_record(text)
        if record.get("ref_id") not in refs:
            raise ValueError(f"{file.path} row {number} has no ref_id of {file.annotations}: {record.get('ref_id')}.")
        box = image_and_box(refs[record["ref_id"]])
        yield number, {**box, "image": record.get("image"), "expression": record.get("text")}


_VQA = _PublicFormat(
    "a file of VQAv2's questions",
    "vqa",
    "questions",
    {"question", "question_id", "image_id"},
    _read_vqa,
    has_second_file=True,
)
_COCO = _PublicFormat("a file of COCO's captions", "captions", "annotations", {"caption"}, _read_coco_captions)
_KARPATHY = _PublicFormat(
    "a split by Karpathy",
    "captions",
    "images",
    {"sentences", "filename", "split"},
    _read_karpathy,
    has_splits=True,
)
_REFS = _PublicFormat(
    "a file of RefCOCO's refs",
    "grounding",
    None,
    {"ref_id", "ann_id", "image_id", "split", "sentences"},
    _read_refs,
    has_splits=True,
    has_second_file=True,
)
