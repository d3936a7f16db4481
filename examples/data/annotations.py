"""Public annotation files, recognised by their content, not by their name.

Their records come out in the columns that `load_task_dataset` reads:

| data set | file | task |
|---|---|---|
| VQAv2 | questions, with the file of annotations | `"vqa"` |
| COCO | `captions_train2014.json` | `"captions"` |
| COCO, Flickr8k, Flickr30k as split by Karpathy | `dataset_coco.json` | `"captions"` |
| NLVR2 | `train.json` | `"nlvr2"` |
| RefCOCO, RefCOCO+, RefCOCOg | `refs(unc).p`, with `instances.json` | `"grounding"` |
| ALBEF's lists | captions, questions, NLVR2; RefCOCO with `refs(unc).p` | as their names say |
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
    A file of annotations, and what else it takes to read it.

    Args:
        path (`Path`): The file.
        default_split (`str`): `"train"`, `"val"` or `"test"`: what to read of a file with several splits.
        split (`str`, *optional*): The same, where it was asked for: another file is then an error.
        annotations (`Path`, *optional*): The second file of VQAv2 and RefCOCO. Default: that of the official name.
    """

    path: Path
    default_split: str
    split: str | None = None
    annotations: Path | None = None

    @classmethod
    def of(
        cls, path: str | None, annotations: str | None, default_split: str, split: str | None
    ) -> "AnnotationFile | None":
        """The file at a path, if there is one; a second file alone is an error."""
        if path is not None:
            return cls(Path(path), default_split, split, None if annotations is None else Path(annotations))
        if annotations is not None:
            name = {"val": "validation"}.get(default_split, default_split)
            raise ValueError(f"{name}_annotations (is {str(annotations)!r}) goes with {name}_file: give both.")
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
            raise FileNotFoundError(f"{self.path} goes with {what}: give it with {option}. There is no {file}.")
        return file

    def of_split(self, items: list[dict], split_of: Callable[[dict], str]) -> list[tuple[int, dict]]:
        """Return the items of the requested split with their numbers in the file."""
        wanted = self.split or self.default_split
        numbered = [(number, item) for number, item in enumerate(items, start=1) if split_of(item) == wanted]
        if not numbered:
            counts = Counter(map(split_of, items))
            only = ", ".join(f"{split} ({count})" for split, count in counts.items())
            option = self.option("split")
            raise ValueError(f"{self.path} has no split {wanted!r}, only {only}: choose one with {option}.")
        return numbered


def read_annotations(file: AnnotationFile, task: str) -> NumberedRecords:
    """
    Yields the records of a file in any of the formats above, as `read_records` does. A path to try at several places
    is a tuple, the likeliest first.

    Args:
        file (`AnnotationFile`)
        task (`str`): What the records are for.

    Raises:
        `FileNotFoundError`: Where the file, or the second one it goes with, does not exist.
        `ValueError`: Where it cannot be read, or holds no data for the task or no such split.
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
        raise ValueError(f"{file.path} is {public.name}, which is for the task {public.task!r}, not {task!r}.")
    file.refuse_unused(public.name, split=public.has_splits, annotations=public.has_second_file)
    try:
        return public.read(content, file)
    except (KeyError, TypeError, AttributeError) as error:
        message = f"{file.path} is {public.name}, but not whole: {type(error).__name__}: {error}."
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
    """The content of a file that is one JSON object as a whole."""
    if file.suffix.lower() != ".json":
        return None
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not content.lstrip().startswith(b"{"):
        return None
    try:
        return parsed_json(content)
    except BadRowError:
        return None  # perhaps JSON lines: reading the records says what is wrong


def _load_json(file: Path) -> Any:
    try:
        return parsed_json(file.read_bytes())
    except BadRowError as error:
        raise ValueError(f"{file} is no valid JSON file: {error}.") from error


def _first(items: Any) -> dict:
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}


def _converted(items: Iterable[tuple[int, Any]], make_record: Callable[[Any], dict], name: str) -> NumberedRecords:
    """Make a record of each item that is not an error already; `name` is the format, for errors."""
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
        raise ValueError(f"{annotations} has no answers: {option} takes the annotations of {file.path}.")
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
    """Images lie in a folder such as `train2014`, which their name or their address says, or all together."""
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

    # `restval` is what the validation images of COCO have left, which everyone trains on.
    items = file.of_split(document["images"], lambda image: {"restval": "train"}.get(image["split"], image["split"]))
    return _converted(items, make_record, _KARPATHY.name)


_KARPATHY = _PublicFormat(
    "a split by Karpathy",
    "captions",
    lambda content: {"sentences", "filename", "split"} <= _first(content.get("images")).keys(),
    _read_karpathy,
    has_splits=True,
)


class _PlainUnpickler(pickle._Unpickler):  # the one in C would make a table as long as a memo's number says
    """An unpickler that refuses every class and function, and so all code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not plain data")


def read_plain_pickle(file: Path) -> Any:
    """
    Reads a pickle of plain data: lists, dictionaries, texts, numbers. Nothing in a hostile one is run.

    Raises:
        `ValueError`: Where there is anything else in it, or it is no pickle.
    """
    try:
        return _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="utf-8").load()
    # What a broken pickle raises depends on where it is broken.
    except Exception as error:
        raise ValueError(
            f"{file} is not read: {error}. Only pickles of lists, dicts, texts and numbers are."
        ) from error


@dataclass(frozen=True)
class _Instances:
    """The boxes of `instances.json`, whose images are COCO's."""

    images: dict[int, dict]
    annotations: dict[int, dict]

    @classmethod
    def read(cls, file: Path) -> "_Instances":
        content = _load_json(file)
        if not isinstance(content, dict) or "bbox" not in _first(content.get("annotations")):
            raise ValueError(f"{file} has no boxes: it should be the instances.json of RefCOCO or COCO.")
        images, annotations = content["images"], content["annotations"]
        return cls({image["id"]: image for image in images}, {each["id"]: each for each in annotations})

    def record(self, ref: dict) -> dict:
        x, y, width, height = self.annotations[ref["ann_id"]]["bbox"]
        paths = _coco_paths(self.images[ref["image_id"]])
        return {"image": paths, "image_id": ref["image_id"], "box": [x, y, x + width, y + height]}


def _read_refs(refs: list, file: AnnotationFile) -> NumberedRecords:
    instances = _Instances.read(file.second_file("instances.json", "the boxes in instances.json"))

    def make_record(ref_and_sentence: tuple[dict, dict]) -> dict:
        ref, sentence = ref_and_sentence
        return {**instances.record(ref), "expression": sentence["sent"], "question_id": sentence["sent_id"]}

    refs_of_split = file.of_split(refs, lambda ref: ref["split"])
    return _converted(_sentences(refs_of_split), make_record, _REFS.name)


def _sentences(refs: list[tuple[int, dict]]) -> Iterator[tuple[int, tuple[dict, dict] | BadRowError]]:
    """Each sentence with its ref and the number of that."""
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
    """A record of NLVR2, whose images are named after it, or of ALBEF's list, which has `images`; ours as it is."""
    if "sentence" not in record or "statement" in record:
        return record
    record = {**record, "statement": record["sentence"]}
    if "identifier" in record and "images" not in record:
        record |= {"images": _nlvr2_paths(record), "question_id": record["identifier"]}
    return record


def _nlvr2_paths(record: dict) -> list[tuple[str, ...]]:
    """The images of train-10171-0-1 are train-10171-0-img0.png and -img1.png, in numbered folders or all together."""
    split, stem = record["identifier"].split("-")[0], record["identifier"].rpartition("-")[0]
    numbered = f"{record['directory']}/" if "directory" in record else ""
    folders = dict.fromkeys([f"{split}/{numbered}", numbered, f"{split}/", ""])
    return [tuple(f"{folder}{stem}-img{side}.png" for folder in folders) for side in (0, 1)]


def _expression_record(file: AnnotationFile) -> Callable[[dict], dict]:
    """Converts records of ALBEF's list, whose boxes are those that the second file has for `ref_id`; ours stay."""
    refs, instances = {}, None
    if file.annotations is not None:
        content = read_plain_pickle(file.annotations)
        if not _REFS.matches(content):
            raise ValueError(f"{file.annotations} has no refs: {file.option('annotations')} takes refs(unc).p here.")
        refs = {ref["ref_id"]: ref for ref in content}
        instances = _Instances.read(AnnotationFile(file.annotations, "").second_file("instances.json", "its boxes"))

    def convert(record: dict) -> dict:
        if "ref_id" not in record or "box" in record:
            return record
        if instances is None:
            raise BadRowError(
                "no box", f"for ALBEF's list give RefCOCO's refs(unc).p with {file.option('annotations')}"
            )
        return {**instances.record(refs[record["ref_id"]]), "image": record["image"], "expression": record["text"]}

    return convert
