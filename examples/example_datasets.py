"""Data sets in, one schema per task: files, the Hub, easy-VQA, and scenes made of its images.

Whatever the origin, the data of a task come out as a `datasets.DatasetDict` whose splits, `train` and `validation`,
have the columns of its schema, see `TASKS`. Rows are checked where they are read, so that a bad one is reported by
file and row before any training starts. Also here: a WordPiece tokenizer trained on the texts, for runs without a
pretrained one.
"""

import functools
import io
import json
import logging
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, Image, Sequence, Value, concatenate_datasets, load_dataset
from datasets.utils import tqdm
from example_formats import AnnotationFile, BadRowError, read_annotations
from example_scenes import easy_vqa_records, scene_records
from tokenizers.trainers import WordPieceTrainer
from transformers import BertTokenizer


logger = logging.getLogger(__name__)

EMBEDDED_DATASETS = ("easy_vqa", "easy_vqa_scenes")
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


# Schemas: one row per text. `image`: decoded to an RGB `PIL.Image` when a row is read. `image_id`: equal for rows that
# share an image. `question_id`: the one given, or else the number of the row. `source`: where the row is from, as in
# "train.jsonl row 17".

VQA_FEATURES = Features(
    {
        "image": Image(mode="RGB"),
        "image_id": Value("string"),
        "question_id": Value("string"),
        "question": Value("string"),
        "answers": Sequence(Value("string")),  # those of the annotators, one or several
        "source": Value("string"),
    }
)
CAPTION_FEATURES = Features(
    {
        "image": Image(mode="RGB"),
        "image_id": Value("string"),
        "caption": Value("string"),
        "source": Value("string"),
    }
)
NLVR2_FEATURES = Features(
    {
        "images": Sequence(Image(mode="RGB")),  # left and right
        "image_ids": Sequence(Value("string")),
        "question_id": Value("string"),
        "statement": Value("string"),
        "label": Value("int64"),  # 1 where the statement is true, 0 where it is false
        "source": Value("string"),
    }
)
GROUNDING_FEATURES = Features(
    {
        "image": Image(mode="RGB"),
        "image_id": Value("string"),
        "question_id": Value("string"),
        "expression": Value("string"),
        "box": Sequence(Value("float32")),  # (x0, y0, x1, y1) in pixels of the image, x1 and y1 exclusive
        "source": Value("string"),
    }
)

# And `target_box`: (x0, y0, x1, y1) in pixels of the tile asked about, x1 and y1 exclusive; None where the answer is
# that there is no such tile.
SCENE_FEATURES = Features({**VQA_FEATURES, "target_box": Sequence(Value("int32"))})


@dataclass(frozen=True)
class Task:
    """
    What a task needs of its data.

    Args:
        name (`str`): As users say it.
        features (`Features`): The columns of its rows.
        text (`str`): The column the model reads.
        columns (`tuple[str, ...]`): The columns it reads of a record, besides those of the images.
        needs (`str`): The columns that a record must have, in words.
        read_texts (`Callable[[dict], list[dict]]`):
            Makes rows of a record, as a rule one: all columns but those of the images and `source`. `question_id` is
            left empty where the record has none.
    """

    name: str
    features: Features
    text: str
    columns: tuple[str, ...]
    needs: str
    read_texts: Callable[[dict], list[dict]]

    @property
    def image_column(self) -> str:
        return "image" if "image" in self.features else "images"


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row: where the row is from, a reason that rows share, the value at fault."""

    source: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.source}: {BadRowError(self.reason, self.detail)}"


def load_task_dataset(
    task: str,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    *,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    train_annotations: str | Path | None = None,
    validation_annotations: str | Path | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    image_root: str | Path | None = None,
    skip_bad_rows: bool = False,
    grid: int | None = None,
    train_scenes: int = 4000,
    validation_scenes: int = 1000,
    seed: int = 0,
    cache_dir: str | None = None,
    token: str | None = None,
    image_check: str | None = None,
    faults: list[Fault] | None = None,
) -> DatasetDict:
    """
    Loads the data of a task.

    Args:
        task (`str`):
            `"vqa"`, `"captions"` (for retrieval, captioning and pre-training), `"nlvr2"` or `"grounding"`.
        dataset_name (`str`, *optional*):
            `"easy_vqa"`: easy-VQA with its official split, whose test part is the split `validation`; for the task
            `"vqa"` only, whose default it is where no file is given. `"easy_vqa_scenes"`: scenes made of its images,
            see `example_scenes.scene_records`; the default of the other tasks. Any other name: a data set of the Hub
            with the columns of a file; its images are not checked, except that the boxes of `"grounding"` lie within
            them.
        dataset_config_name (`str`, *optional*):
            Configuration of the data set of the Hub.
        train_file (`str` or `Path`, *optional*):
            JSON (a list of objects, or one object per line), JSONL, CSV or Parquet file, in UTF-8. Rows count from 1:
            the lines of JSONL, the items of a JSON list, the records of CSV (without the header) and of Parquet. Where
            a list is wanted, a cell of CSV holds a JSON list, or several texts separated by `|`. Columns by task:

            - `"vqa"`: `image`, `question`, and `answer` (one) or `answers` (a list; blank ones are dropped)
            - `"captions"`: `image`, and `caption` (one) or `captions` (a list: a row is made of each)
            - `"nlvr2"`: `images` (two) or `left_image` and `right_image`; `statement`; `label` (1, 0, true or false)
            - `"grounding"`: `image`, `expression`, `box` ([x0, y0, x1, y1] in pixels, at most one pixel outside the
              image, and cut to it)

            An `image` is a path, in Parquet also a struct of `bytes` and `path`. `image_id` (`image_ids` for
            `"nlvr2"`) and `question_id` are optional.

            Or an annotation file of VQAv2, COCO, Flickr30k, NLVR2, RefCOCO or ALBEF as it is: see `example_formats`.
            Rows then count from 1 in the list of questions, captions, images or refs.
        validation_file (`str` or `Path`, *optional*):
            As `train_file`. One of both is enough: the result then has that split only.
        train_annotations (`str` or `Path`, *optional*):
            The second file that goes with `train_file`: VQAv2's annotations, RefCOCO's `instances.json`, or RefCOCO's
            `refs(unc).p` for a list of ALBEF. Default: the file of the official name beside the first.
        validation_annotations (`str` or `Path`, *optional*):
            As `train_annotations`.
        train_split (`str`, *optional*):
            What to take for training of a file or a data set of the Hub that has several splits. Default: `"train"`.
        validation_split (`str`, *optional*):
            The same for the split `validation`, such as `"testA"`. Default: `"val"` of a file, `"validation"` of the
            Hub.
        image_root (`str` or `Path`, *optional*):
            Folder the paths of the images are relative to. Defaults to that of the file they are in.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Whether to skip the rows that cannot be used, with a warning that counts them, rather than to raise. Images
            are then decoded to the end, so that truncated ones are found too, and not only verified.
        grid (`int`, *optional*):
            Tiles along each side of a scene, 1 to 8. Default: `example_scenes.DEFAULT_GRID`, by task.
        train_scenes (`int`, *optional*, defaults to 4000):
            Number of scenes of the split `train`; for `"nlvr2"` of statements, each about two pairs of scenes.
        validation_scenes (`int`, *optional*, defaults to 1000):
            Number of scenes of the split `validation`.
        seed (`int`, *optional*, defaults to 0):
            Seed of the scenes.
        cache_dir (`str`, *optional*):
            Folder for data sets of the Hub and Parquet files with images. Defaults to that of the datasets library.
        token (`str`, *optional*):
            Access token for data sets of the Hub.
        image_check (`str`, *optional*):
            How to check all images: `"header"`, `"verify"` or `"decode"`. Default: as said above.
        faults (`list[Fault]`, *optional*):
            A list that takes what is wrong with the rows, which is then not raised: the splits have the other rows.

    Returns:
        `DatasetDict`: Splits with the columns of `TASKS[task].features`, those of scenes for `"vqa"` of
        `SCENE_FEATURES`.

    Raises:
        `ValueError`: Where rows cannot be used, naming the first few, or where the arguments contradict each other.
        `FileNotFoundError`: Where a file or `image_root` does not exist.
        `ImportError`: Where easy-VQA is asked for and its package is missing.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}: choose one of {', '.join(TASKS)}.")
    splits = {"train": train_split, "validation": validation_split}
    files = {
        "train": _annotation_file("train", train_file, train_split, train_annotations),
        "validation": _annotation_file("validation", validation_file, validation_split, validation_annotations),
    }
    files = {split: file for split, file in files.items() if file is not None}
    if files and dataset_name is not None:
        raise ValueError(
            f"dataset_name is {dataset_name!r}, and there are files as well ({sorted(files)}): give one or the other."
        )
    if image_root is not None and not files:
        raise ValueError(f"image_root (is {str(image_root)!r}) goes with train_file or validation_file: give one.")
    reader = _Reader(TASKS[task], skip_bad_rows, image_check, faults, cache_dir)
    if files:
        return DatasetDict({split: reader.read_file(file, image_root) for split, file in files.items()})
    name = dataset_name or ("easy_vqa" if task == "vqa" else "easy_vqa_scenes")
    if name not in EMBEDDED_DATASETS:
        hub = load_dataset(name, dataset_config_name, cache_dir=cache_dir, token=token)
        return DatasetDict(
            {split: reader.read_hub(hub[part], f"{name} {part}") for split, part in _hub_splits(hub, name, splits)}
        )
    if chosen := [f"{split}_split" for split in splits if splits[split] is not None]:
        raise ValueError(f"{' and '.join(chosen)}: {name} has its own splits, leave them out.")
    if name == "easy_vqa" and task != "vqa":
        raise ValueError(f"easy_vqa has questions only: for {task} take easy_vqa_scenes.")
    if name == "easy_vqa":
        records = {"train": easy_vqa_records("train"), "test": easy_vqa_records("test")}
    else:
        records = {
            "train": scene_records(task, "train", train_scenes, grid, seed),
            "test": scene_records(task, "test", validation_scenes, grid, seed),
        }
    train, test = (reader.read_embedded(part, f"{name} {split}") for split, part in records.items())
    return DatasetDict(train=train, validation=test)


def _annotation_file(
    split: str, file: str | Path | None, part: str | None, annotations: str | Path | None
) -> AnnotationFile | None:
    if file is not None:
        second_file = None if annotations is None else Path(annotations)
        return AnnotationFile(Path(file), {"validation": "val"}.get(split, split), part, second_file)
    if annotations is not None:
        raise ValueError(f"{split}_annotations (is {str(annotations)!r}) goes with {split}_file: give both.")
    return None


def _hub_splits(hub: DatasetDict, name: str, splits: dict[str, str | None]) -> list[tuple[str, str]]:
    """Pairs of our split and the data set's. One that is there for evaluation only has no training split."""
    parts = [(split, part or split) for split, part in splits.items() if part or split in hub or split != "train"]
    if missing := {part for _, part in parts} - hub.keys():
        raise ValueError(
            f"{name} has no split {sorted(missing)}, only {sorted(hub)}: choose with train_split and "
            "validation_split, or choose another data set or configuration."
        )
    return parts


# Texts: what each task reads from a record


def _text(value: Any, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRowError(f"{column} is not text", reprlib.repr(value))
    return str(value).strip()


def _missing(column: str, record: dict) -> BadRowError:
    return BadRowError(f"no {column}", f"its columns are {', '.join(map(str, record))}")


def _filled_text(record: dict, column: str) -> str:
    text = _text(record.get(column), column)
    if not text:
        raise _missing(column, record)
    return text


def _list(value: Any, column: str) -> list:
    """A list, or the cell of CSV that stands for one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadRowError(f"{column} is not a JSON list", f"{reprlib.repr(value)}: {error}") from error
    elif isinstance(value, str):
        value = [text for text in value.split("|") if text.strip()]
    if not isinstance(value, list):
        raise BadRowError(f"{column} is not a list", reprlib.repr(value))
    return value


def _one_or_several(record: dict, one: str, several: str) -> list:
    if values := record.get(several):
        return _list(values, several)
    value = record.get(one)
    return value if isinstance(value, list) else [value]


def _question(record: dict) -> list[dict]:
    question = _filled_text(record, "question")
    # VQAv2 has a dict per annotator, with the confidence and the number of the annotator beside the answer.
    answers = _one_or_several(record, "answer", "answers")
    texts = [_text(each.get("answer") if isinstance(each, dict) else each, "an answer") for each in answers]
    texts = [text for text in texts if text]
    if not texts:
        raise _missing("answer", record)
    return [{"question_id": _text(record.get("question_id"), "question_id"), "question": question, "answers": texts}]


def _captions(record: dict) -> list[dict]:
    captions = [_text(caption, "a caption") for caption in _one_or_several(record, "caption", "captions")]
    if not any(captions):
        raise _missing("caption", record)
    if not all(captions):
        raise BadRowError("an empty caption", f"number {captions.index('') + 1} of {len(captions)}")
    return [{"caption": caption} for caption in captions]


LABELS = {"true": 1, "false": 0, "1": 1, "0": 0}


def _statement(record: dict) -> list[dict]:
    statement = _filled_text(record, "statement")
    label = str("" if record.get("label") is None else record["label"]).strip().lower()
    if not label:
        raise _missing("label", record)
    if label not in LABELS:
        raise BadRowError("label is not 1, 0, true or false", reprlib.repr(record["label"]))
    question_id = _text(record.get("question_id"), "question_id")
    return [{"question_id": question_id, "statement": statement, "label": LABELS[label]}]


def _expression(record: dict) -> list[dict]:
    expression = _filled_text(record, "expression")
    if record.get("box") in (None, ""):
        raise _missing("box", record)
    try:
        x0, y0, x1, y1 = box = [float(number) for number in _list(record["box"], "box")]
    except (TypeError, ValueError) as error:
        raise BadRowError("box is not four numbers", reprlib.repr(record["box"])) from error
    if not all(map(math.isfinite, box)):
        raise BadRowError("box is not four numbers", str(box))
    if x0 >= x1 or y0 >= y1:
        raise BadRowError("box without area", f"[x0, y0, x1, y1] = {box}")
    return [{"question_id": _text(record.get("question_id"), "question_id"), "expression": expression, "box": box}]


TASKS = [
    Task(
        name="vqa",
        features=VQA_FEATURES,
        text="question",
        columns=("image_id", "question_id", "question", "answer", "answers"),
        needs="image, question and answer",
        read_texts=_question,
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
        columns=("image_id", "question_id", "expression", "box"),
        needs="image, expression and box",
        read_texts=_expression,
    ),
]
TASKS = {task.name: task for task in TASKS}
TEXT_COLUMNS = {name: task.text for name, task in TASKS.items()}


# Images


class _Found(NamedTuple):
    """An image as `datasets.Image` takes it; its path and (width, height) where they are known."""

    image: Any
    path: str | None
    size: tuple[int, int] | None


def _image_values(record: dict, task: Task) -> list:
    if task.image_column == "image":
        return [record.get("image")]
    if record.get("images"):
        values = _list(record["images"], "images")
    else:
        values = [record.get("left_image"), record.get("right_image")]
    if len(values) != 2:
        raise BadRowError("not two images", reprlib.repr(values))
    return values


class _ImageFinder:
    """
    Finds the images of a record: files in a folder, each checked once, or encoded ones as they are.

    Args:
        task (`Task`)
        root (`Path`): Folder that paths are relative to.
        check (`str`, *optional*): How to check them, see `_inspect`.
    """

    def __init__(self, task: Task, root: Path, check: str | None):
        if not root.is_dir():
            raise FileNotFoundError(f"There is no folder {root}: image_root is the one the images are in.")
        self.task, self.root, self.check = task, root, check
        # Texts share images.
        self.inspect_once = functools.cache(functools.partial(_inspect, check=check))

    def __call__(self, number: int, record: dict) -> list[_Found]:
        return [self.find(value) for value in _image_values(record, self.task)]

    def find(self, value: Any) -> _Found:
        if isinstance(value, dict) and value.get("bytes") is not None:
            return _Found(value, None, _size(_inspect(value["bytes"], self.check)))
        if isinstance(value, tuple):  # of places, the likeliest first
            value = next((path for path in value if (self.root / path).is_file()), value[0])
        path = str(self.root / _filled_text({"image": value}, "image"))
        return _Found(path, path, _size(self.inspect_once(path)))


def _inspect(image: str | bytes, check: str | None) -> tuple[int, int] | BadRowError | None:
    """
    The width and height of an image, by its path or encoded, or what is wrong with it. By `check`, `"header"` reads
    no more than these, `"verify"` looks for damage without decoding it, `"decode"` finds truncated images too, and
    None looks at nothing.
    """
    if check is None:
        return None
    name = image if isinstance(image, str) else f"{len(image)} bytes"
    try:
        with PIL.Image.open(image if isinstance(image, str) else io.BytesIO(image)) as opened:
            size = opened.size
            {"header": lambda: None, "verify": opened.verify, "decode": opened.load}[check]()
    except FileNotFoundError:
        return BadRowError("missing image", name)
    # What else a broken file raises is up to the Pillow plugin of its format.
    except Exception as error:
        return BadRowError("unreadable image", f"{name}: {error}")
    return size


def _size(inspected: tuple[int, int] | BadRowError | None) -> tuple[int, int] | None:
    if isinstance(inspected, BadRowError):
        raise BadRowError(inspected.reason, inspected.detail)
    return inspected


# Rows: a record in, rows of the schema out


class _RowMaker:
    """
    Makes the rows of a split.

    Args:
        task (`Task`)
        name (`str`): Of the split, for `source` and errors.
        find_images (`Callable[[int, dict], list[_Found]]`): Given a record's number and the record.
    """

    def __init__(self, task: Task, name: str, find_images: Callable[[int, dict], list[_Found]]):
        self.task, self.name, self.find_images = task, name, find_images
        self.path_of_id: dict[str, str] = {}

    def __call__(self, number: int, record: dict) -> list[dict]:
        texts = self.task.read_texts(record)
        found = self.find_images(number, record)
        images, image_ids = [image for image, _, _ in found], self.image_ids(number, record, found)
        if self.task.image_column == "image":
            shared = {"image": images[0], "image_id": image_ids[0]}
        else:
            shared = {"images": images, "image_ids": image_ids}
        shared["source"] = f"{self.name} row {number}"
        for row in texts:
            if "question_id" in row:
                row["question_id"] = row["question_id"] or str(number)
            if "box" in row and found[0].size is not None:
                row["box"] = _within(row["box"], found[0].size)
        return [{**shared, **row} for row in texts]

    def image_ids(self, number: int, record: dict, found: list[_Found]) -> list[str]:
        if self.task.image_column == "image":
            given, defaults = [record.get("image_id")], [str(number)]
        else:
            given = _list(record.get("image_ids") or [None, None], "image_ids")
            defaults = [f"{number} left", f"{number} right"]
        if len(given) != len(found):
            raise BadRowError("not two image_ids", reprlib.repr(given))
        ids = [_text(value, "image_id") for value in given]
        ids = [id or image.path or default for id, image, default in zip(ids, found, defaults)]
        for id, image in zip(ids, found):
            if self.path_of_id.setdefault(id, image.path) != image.path:
                raise BadRowError("image_id of two images", f"{id}: {self.path_of_id[id]} and {image.path}")
        return ids


def _within(box: list[float], size: tuple[int, int], tolerance: float = 1.0) -> list[float]:
    """The box cut to the image: data sets round corners, so that some are off by less than a pixel."""
    limits = [*size, *size]
    if any(not -tolerance <= value <= limit + tolerance for value, limit in zip(box, limits)):
        raise BadRowError("box outside the image", f"[x0, y0, x1, y1] = {box}, the image is {size[0]} x {size[1]}")
    cut = [min(max(value, 0.0), float(limit)) for value, limit in zip(box, limits)]
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        raise BadRowError("box outside the image", f"[x0, y0, x1, y1] = {box}, the image is {size[0]} x {size[1]}")
    return cut


@dataclass(frozen=True)
class _Reader:
    """Reads the splits of a task, and knows what to do with rows that cannot be used."""

    task: Task
    skip_bad_rows: bool
    image_check: str | None
    faults: list[Fault] | None
    cache_dir: str | None

    def read_file(self, file: AnnotationFile, image_root: str | Path | None) -> Dataset:
        name, check = file.path.name, self.image_check or ("decode" if self.skip_bad_rows else "verify")
        if _has_encoded_images(file.path, self.task):
            table = load_dataset("parquet", data_files=str(file.path), split="train", cache_dir=self.cache_dir)
            return self.read_table(table, name, check)
        folder = file.path.parent if image_root is None else Path(image_root)
        make_rows = _RowMaker(self.task, name, _ImageFinder(self.task, folder, check))
        return _as_dataset(self.good_rows(read_annotations(file, self.task.name), make_rows, name), self.task.features)

    def read_embedded(self, records: Iterable[dict], name: str) -> Dataset:
        make_known_rows = _RowMaker(self.task, name, _ImageFinder(self.task, Path(), self.image_check))

        def make_rows(number: int, record: dict) -> list[dict]:
            extra = {"target_box": record["target_box"]} if "target_box" in record else {}
            return [{**row, **extra} for row in make_known_rows(number, record)]

        rows = self.good_rows(enumerate(records, start=1), make_rows, name)
        return _as_dataset(rows, SCENE_FEATURES if rows and "target_box" in rows[0] else self.task.features)

    def read_hub(self, table: Dataset, name: str) -> Dataset:
        # Boxes are checked against the size of their image.
        return self.read_table(table, name, self.image_check or ("header" if self.task.name == "grounding" else None))

    def read_table(self, table: Dataset, name: str, check: str | None) -> Dataset:
        images = _images_of_table(table, self.task, name)
        make_known_rows = _RowMaker(self.task, name, _TableImageFinder(images, self.task, check))
        indices = []

        def make_rows(number: int, record: dict) -> list[dict]:
            rows = make_known_rows(number, record)
            indices.extend([number - 1] * len(rows))
            return rows

        # The images stay where they are: only the texts are read.
        texts = table.select_columns([column for column in table.column_names if column in self.task.columns])
        rows = self.good_rows(enumerate(texts, start=1), make_rows, name)
        features = {name: feature for name, feature in self.task.features.items() if name != self.task.image_column}
        rows = _as_dataset(rows, Features(features))
        return concatenate_datasets([images.select(indices), rows], axis=1).select_columns(list(self.task.features))

    def good_rows(
        self,
        records: Iterable[tuple[int, dict | BadRowError]],
        make_rows: Callable[[int, dict], list[dict]],
        name: str,
    ) -> list[dict]:
        """Returns all `make_rows(number, record)`; `BadRowError`s are raised, counted and skipped, or handed over, at
        the end. A record may be such an error already: a line that is no JSON."""
        rows, bad, total = [], [], 0
        for number, record in tqdm(records, desc=f"Reading {name}", unit=" rows"):
            total += 1
            try:
                if isinstance(record, BadRowError):
                    raise record
                rows += make_rows(number, record)
            except BadRowError as error:
                bad.append(Fault(f"{name} row {number}", error.reason, error.detail))
        if self.faults is not None:
            self.faults.extend(bad)
            return rows
        if bad and not self.skip_bad_rows:
            raise ValueError(_describe(bad, name, total))
        if bad:
            reasons = Counter(fault.reason for fault in bad)
            counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
            logger.warning(f"Skipped {len(bad)} of the {total} rows of {name} ({counts}).")
        if not rows:
            raise ValueError(f"{name} has no row that can be used: it needs the columns {self.task.needs}.")
        return rows


def _as_dataset(rows: list[dict], features: Features) -> Dataset:
    return Dataset.from_dict({column: [row[column] for row in rows] for column in features}, features=features)


def _describe(bad: list[Fault], name: str, total: int, shown: int = 5) -> str:
    lines = [f"{len(bad)} of the {total} rows of {name} cannot be used:", *(f"  {fault}" for fault in bad[:shown])]
    if len(bad) > shown:
        lines.append(f"  and {len(bad) - shown} more")
    return "\n".join([*lines, "Mend them, or leave them out with --skip_bad_rows."])


# Tables that hold their images: the Hub, and Parquet with encoded images


def _has_encoded_images(file: Path, task: Task) -> bool:
    if file.suffix.lower() != ".parquet" or not file.is_file():
        return False
    try:
        schema = pyarrow.parquet.read_schema(file)
    except pyarrow.ArrowInvalid:
        return False  # reading the records says so
    columns = [task.image_column] if task.image_column in schema.names else ["left_image"]
    types = [schema.field(column).type for column in columns if column in schema.names]
    types = [type.value_type if pyarrow.types.is_list(type) else type for type in types]
    return any(map(pyarrow.types.is_struct, types))


def _images_of_table(table: Dataset, task: Task, name: str) -> Dataset:
    """The column of the images alone, as the schema has it."""
    column, pair = task.image_column, ["left_image", "right_image"]
    has_pair = column == "images" and column not in table.column_names and {*pair} <= {*table.column_names}
    if missing := ({task.text} if has_pair else {column, task.text}) - {*table.column_names}:
        raise ValueError(f"{name} has no columns {sorted(missing)}, only {table.column_names}: rename them.")
    if not has_pair:
        return table.select_columns(column).cast_column(column, task.features[column])
    sides = table.select_columns(pair)
    for side in pair:
        sides = sides.cast_column(side, Image(decode=False))
    return sides.map(
        lambda row: {column: [row[side] for side in pair]},
        remove_columns=pair,
        features=Features({column: task.features[column]}),
        desc=f"Pairing the images of {name}",
    )


class _TableImageFinder:
    """
    Checks the images of a record, whose place in the table is its number, and leaves them there.

    Args:
        images (`Dataset`): See `_images_of_table`.
        task (`Task`)
        check (`str`, *optional*): How to check them, see `_inspect`.
    """

    def __init__(self, images: Dataset, task: Task, check: str | None):
        self.column, self.check = task.image_column, check
        encoded = Image(decode=False)
        self.images = images.cast_column(self.column, encoded if self.column == "image" else Sequence(encoded))

    def __call__(self, number: int, record: dict) -> list[_Found]:
        if self.check is None:
            return [_Found(None, None, None)] * (1 if self.column == "image" else 2)
        value = self.images[number - 1][self.column]
        images = value if isinstance(value, list) else [value]
        if len(images) != (1 if self.column == "image" else 2):
            raise BadRowError("not two images", f"{len(images)} of them")
        encoded = [image and (image["path"] if image["bytes"] is None else image["bytes"]) for image in images]
        if None in encoded:
            raise BadRowError("no image")
        return [_Found(None, None, _size(_inspect(image, self.check))) for image in encoded]


# Tokenizer


def train_wordpiece_tokenizer(texts: Iterable[str], vocab_size: int = 1000) -> BertTokenizer:
    """
    Trains a lower-casing WordPiece tokenizer as BERT's on texts; the same texts always give the same vocabulary.

    Args:
        texts (`Iterable[str]`):
            The texts, such as the questions of a data set.
        vocab_size (`int`, *optional*, defaults to 1000):
            Size of the vocabulary at most, though never fewer than the special tokens, `[PAD]` (id 0), `[UNK]`,
            `[CLS]`, `[SEP]` and `[MASK]`, and twice the characters of the texts: at the start of a word and within.

    Returns:
        `BertTokenizer`: It makes `[CLS] ... [SEP]` of a text, and saves and loads as any other tokenizer.

    Raises:
        `ValueError`: Where the texts have no characters to learn from.
    """
    texts = list(texts)
    backend = BertTokenizer().backend_tokenizer
    alphabet = sorted(
        {
            character
            for text in texts
            for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
            for character in word
        }
    )
    if not alphabet:
        raise ValueError(f"A tokenizer cannot be trained on {len(texts)} texts without a character: give it texts.")
    # The trainer numbers the characters within words in the order of a hash map, another one each run, and breaks ties
    # by these numbers. Given as special tokens they have theirs before it starts.
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + [f"##{character}" for character in alphabet],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=backend.get_vocab(with_added_tokens=False))
