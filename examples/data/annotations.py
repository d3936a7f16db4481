"""Public annotation files, recognized by their content and converted to the columns of `load_task_dataset`.

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
import io
import pickle
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trips_examples.data.faults import BadRowError
from trips_examples.data.formats import NumberedRecords, existing_file, parsed_json, read_records


@dataclass(frozen=True)
class AnnotationFile:
    """
    A file of annotations and the options for reading it.

    Args:
        path (`Path`)
        default_split (`str`): Split to read from a file with several splits: `"train"`, `"val"` or `"test"`.
        split (`str`, *optional*): Replaces `default_split`. A file without splits is then an error.
        annotations (`Path`, *optional*): Second file of VQAv2 and RefCOCO. Default: the file with the official name.
    """

    path: Path
    default_split: str
    split: str | None = None
    annotations: Path | None = None

    @classmethod
    def of(
        cls, path: str | None, annotations: str | None, default_split: str, split: str | None
    ) -> "AnnotationFile | None":
        """Return the file at a path, or None without a path. A second file alone is an error."""
        if path is not None:
            return cls(Path(path), default_split, split, None if annotations is None else Path(annotations))
        if annotations is not None:
            name = {"val": "validation"}.get(default_split, default_split)
            raise ValueError(f"{name}_annotations (is {str(annotations)!r}) goes with {name}_file. Give both.")
        return None

    def option(self, what: str) -> str:
        return f"--{'validation' if self.default_split == 'val' else self.default_split}_{what}"

    def refuse_unused(self, name: str, split: bool, annotations: bool):
        """Raise a `ValueError` if a split or a second file is given that this format does not have."""
        if self.split is not None and not split:
            raise ValueError(f"{self.path} is {name}, without splits: leave out {self.option('split')} {self.split}.")
        if self.annotations is not None and not annotations:
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
            counts = Counter(map(split_of, items))
            only = ", ".join(f"{split} ({count})" for split, count in counts.items())
            option = self.option("split")
            raise ValueError(f"{self.path} has no split {wanted!r}, only {only}. Choose one with {option}.")
        return numbered


def read_annotations(file: AnnotationFile, task: str) -> NumberedRecords:
    """
    Yield the records of a file in any of the formats above, as `read_records` does. An image with several possible
    paths has a tuple of them, the likeliest first.

    Args:
        file (`AnnotationFile`)
        task (`str`)

    Raises:
        `FileNotFoundError`: The file or its second file does not exist.
        `ValueError`: The file cannot be read, belongs to another task, or lacks the split.
    """
    existing_file(file.path)
    if file.path.suffix.lower() in (".p", ".pkl", ".pickle"):
        known, content = [_REFS], read_plain_pickle(file.path)
    else:
        known, content = _DOCUMENTS, _document(file.path)
    public = next((each for each in known if content and each.matches(content)), None)
    if public is None and known == [_REFS]:
        raise ValueError(f"{file.path} is a pickle, and not of RefCOCO's refs: convert it to JSON lines.")
    if public is None:
        return _read_lists(file, task)
    if public.task != task:
        raise ValueError(f"{file.path} is {public.name} for the task {public.task!r}, not {task!r}.")
    file.refuse_unused(public.name, split=public.has_splits, annotations=public.has_second_file)
    try:
        return public.read(content, file)
    except (KeyError, TypeError, AttributeError) as error:
        message = f"{file.path} is {public.name}, but incomplete: {type(error).__name__}: {error}."
        raise ValueError(message) from error


@dataclass(frozen=True)
class _PublicFormat:
    name: str
    task: str
    matches: Callable[[Any], bool]
    read: Callable[[Any, AnnotationFile], NumberedRecords]
    has_splits: bool = False
    has_second_file: bool = False


def _document(file: Path) -> dict | None:
    """Return the content of a file that is one JSON object, or None."""
    if file.suffix.lower() != ".json":
        return None
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not content.lstrip().startswith(b"{"):
        return None
    try:
        return parsed_json(content)
    except BadRowError:
        return None  # JSON lines, or an error that reading the records reports


def _load_json(file: Path) -> Any:
    try:
        return parsed_json(file.read_bytes())
    except BadRowError as error:
        raise ValueError(f"{file} is not a valid JSON file: {error}.") from error


def _first(items: Any) -> dict:
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}


def _converted(items: Iterable[tuple[int, Any]], make_record: Callable[[Any], dict], name: str) -> NumberedRecords:
    """Convert items to records. Errors are passed on; `name` is the format, for new errors."""
    for number, item in items:
        try:
            yield number, item if isinstance(item, BadRowError) else make_record(item)
        except BadRowError as error:
            yield number, error
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            yield number, BadRowError(f"not as in {name}", f"{type(error).__name__}: {error}")


def _read_vqa(document: dict, file: AnnotationFile) -> NumberedRecords:
    official_name = file.path.name.replace("OpenEnded_", "").replace("questions", "annotations")
    annotations = file.second_file(official_name, "a file of annotations")
    content = _load_json(annotations)
    if "answers" not in _first(content.get("annotations") if isinstance(content, dict) else None):
        option = file.option("annotations")
        raise ValueError(f"{annotations} has no answers. {option} takes the annotations of {file.path}.")
    by_question = {each["question_id"]: each for each in content["annotations"]}
    folder = document["data_subtype"].replace("test-dev", "test")

    def make_record(question: dict) -> dict:
        name = f"COCO_{folder}_{int(question['image_id']):012d}.jpg"
        columns = {column: question[column] for column in ("image_id", "question_id", "question")}
        annotation = by_question.get(question["question_id"], {})
        columns |= {column: annotation.get(column) for column in ("answers", "question_type", "answer_type")}
        return {"image": (f"{folder}/{name}", name), **columns}

    return _converted(enumerate(document["questions"], start=1), make_record, _VQA.name)


_VQA = _PublicFormat(
    "a file of VQAv2's questions",
    "vqa",
    lambda content: {"question", "question_id", "image_id"} <= _first(content.get("questions")).keys(),
    _read_vqa,
    has_second_file=True,
)


def _read_coco_captions(document: dict, file: AnnotationFile) -> NumberedRecords:
    images = {image["id"]: image for image in document["images"]}

    def make_record(annotation: dict) -> dict:
        paths = _coco_paths(images[annotation["image_id"]])
        return {"image": paths, "image_id": annotation["image_id"], "caption": annotation["caption"]}

    return _converted(enumerate(document["annotations"], start=1), make_record, _COCO.name)


def _coco_paths(image: dict) -> tuple[str, ...]:
    """Return the possible paths of an image: in a folder such as `train2014`, from its name or URL, or without one."""
    name = image["file_name"]
    if name.startswith("COCO_"):
        return f"{name.split('_')[1]}/{name}", name
    address = image.get("coco_url", "").split("/")
    return (f"{address[-2]}/{name}", name) if len(address) > 1 else (name,)


_COCO = _PublicFormat(
    "a file of COCO's captions",
    "captions",
    lambda content: "images" in content and "caption" in _first(content.get("annotations")),
    _read_coco_captions,
)


def _read_karpathy(document: dict, file: AnnotationFile) -> NumberedRecords:
    def make_record(image: dict) -> dict:
        name, folder = image["filename"], image.get("filepath")
        return {
            "image": (f"{folder}/{name}", name) if folder else name,
            "image_id": image.get("cocoid", image.get("imgid")),
            "captions": [sentence["raw"] for sentence in image["sentences"]],
        }

    # `restval` holds the remaining validation images of COCO, which are commonly used for training.
    items = file.of_split(document["images"], lambda image: {"restval": "train"}.get(image["split"], image["split"]))
    return _converted(items, make_record, _KARPATHY.name)


_KARPATHY = _PublicFormat(
    "a split by Karpathy",
    "captions",
    lambda content: {"sentences", "filename", "split"} <= _first(content.get("images")).keys(),
    _read_karpathy,
    has_splits=True,
)


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


def _read_instances(file: Path) -> Callable[[dict], dict]:
    """Return a function from a ref to its image and its box in `instances.json`."""
    content = _load_json(file)
    if not isinstance(content, dict) or "bbox" not in _first(content.get("annotations")):
        raise ValueError(f"{file} has no boxes. Give the instances.json of RefCOCO or COCO.")
    images, annotations = ({each["id"]: each for each in content[name]} for name in ("images", "annotations"))

    def image_and_box(ref: dict) -> dict:
        x, y, width, height = annotations[ref["ann_id"]]["bbox"]
        paths = _coco_paths(images[ref["image_id"]])
        return {"image": paths, "image_id": ref["image_id"], "box": [x, y, x + width, y + height]}

    return image_and_box


def _read_refs(refs: list, file: AnnotationFile) -> NumberedRecords:
    image_and_box = _read_instances(file.second_file("instances.json", "the boxes in instances.json"))

    def make_record(ref_and_sentence: tuple[dict, dict]) -> dict:
        ref, sentence = ref_and_sentence
        return {**image_and_box(ref), "expression": sentence["sent"], "question_id": sentence["sent_id"]}

    refs_of_split = file.of_split(refs, lambda ref: ref["split"])
    return _converted(_sentences(refs_of_split), make_record, _REFS.name)


def _sentences(refs: list[tuple[int, dict]]) -> Iterator[tuple[int, tuple[dict, dict] | BadRowError]]:
    """Yield each sentence with its ref and the ref's number."""
    for number, ref in refs:
        sentences = ref.get("sentences")
        if not isinstance(sentences, list) or not sentences:
            yield number, BadRowError("no expression", f"its sentences are {reprlib.repr(sentences)}")
            continue
        yield from ((number, (ref, sentence)) for sentence in sentences)


_REFS = _PublicFormat(
    "a file of RefCOCO's refs",
    "grounding",
    lambda content: {"ref_id", "ann_id", "image_id", "split", "sentences"} <= _first(content).keys(),
    _read_refs,
    has_splits=True,
    has_second_file=True,
)


_DOCUMENTS = [_VQA, _COCO, _KARPATHY]


def _read_lists(file: AnnotationFile, task: str) -> NumberedRecords:
    file.refuse_unused("a list of rows", split=False, annotations=task == "grounding")
    if task == "nlvr2":
        return _converted(read_records(file.path), _statement_record, "NLVR2")
    if task == "grounding":
        return _converted(read_records(file.path), _expression_record(file), "ALBEF's lists of RefCOCO")
    return read_records(file.path)


def _statement_record(record: dict) -> dict:
    """Convert a record of NLVR2, or of ALBEF's list, which has `images`. Other records are returned unchanged."""
    if "sentence" not in record or "statement" in record:
        return record
    record = {**record, "statement": record["sentence"]}
    if "identifier" in record and "images" not in record:
        record |= {"images": _nlvr2_paths(record), "question_id": record["identifier"]}
    return record


def _nlvr2_paths(record: dict) -> list[tuple[str, ...]]:
    """Return the possible paths of both images. Those of train-10171-0-1 are train-10171-0-img0.png and -img1.png."""
    split, stem = record["identifier"].split("-")[0], record["identifier"].rpartition("-")[0]
    numbered = f"{record['directory']}/" if "directory" in record else ""
    folders = dict.fromkeys([f"{split}/{numbered}", numbered, f"{split}/", ""])
    return [tuple(f"{folder}{stem}-img{side}.png" for folder in folders) for side in (0, 1)]


def _expression_record(file: AnnotationFile) -> Callable[[dict], dict]:
    """Return a converter of ALBEF's records, which takes the box of a `ref_id` from the second file."""
    refs, image_and_box = {}, None
    if file.annotations is not None:
        content = read_plain_pickle(file.annotations)
        if not _REFS.matches(content):
            raise ValueError(f"{file.annotations} has no refs. {file.option('annotations')} takes refs(unc).p here.")
        refs = {ref["ref_id"]: ref for ref in content}
        image_and_box = _read_instances(
            AnnotationFile(file.annotations, "").second_file("instances.json", "its boxes")
        )

    def convert(record: dict) -> dict:
        if "ref_id" not in record or "box" in record:
            return record
        if image_and_box is None:
            raise BadRowError(
                "no box", f"for ALBEF's list give RefCOCO's refs(unc).p with {file.option('annotations')}"
            )
        return {**image_and_box(refs[record["ref_id"]]), "image": record["image"], "expression": record["text"]}

    return convert
