"""Data sets in, one schema per task: files, the Hub, easy-VQA, and scenes made of its images.

Whatever the origin, the data of a task come out as a `datasets.DatasetDict` whose splits, `train` and `validation`,
have the columns of its schema, see `tasks`. Rows are checked where they are read, so that a bad one is
reported by file and row before any training starts.
"""

import logging
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, concatenate_datasets, load_dataset
from datasets.utils import tqdm

from trips_examples.data.annotations import AnnotationFile, read_annotations
from trips_examples.data.formats import BadRowError
from trips_examples.data.images import Found, ImageFinder, TableImageFinder, has_encoded_images, images_of_table
from trips_examples.data.scenes import easy_vqa_records, scene_records
from trips_examples.data.tasks import SCENE_FEATURES, TASKS, Task, list_of, text_of


logger = logging.getLogger(__name__)

EMBEDDED_DATASETS = ("easy_vqa", "easy_vqa_scenes")


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
            see `scenes.scene_records`; the default of the other tasks. Any other name: a data set of the Hub
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

            Or an annotation file of VQAv2, COCO, Flickr30k, NLVR2, RefCOCO or ALBEF as it is: see `annotations`.
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
            Tiles along each side of a scene, 1 to 8. Default: `scenes.DEFAULT_GRID`, by task.
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


# Rows: a record in, rows of the schema out


class _RowMaker:
    """
    Makes the rows of a split.

    Args:
        task (`Task`)
        name (`str`): Of the split, for `source` and errors.
        find_images (`Callable[[int, dict], list[Found]]`): Given a record's number and the record.
    """

    def __init__(self, task: Task, name: str, find_images: Callable[[int, dict], list[Found]]):
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

    def image_ids(self, number: int, record: dict, found: list[Found]) -> list[str]:
        if self.task.image_column == "image":
            given, defaults = [record.get("image_id")], [f"{self.name} {number}"]
        else:
            given = list_of(record.get("image_ids") or [None, None], "image_ids")
            defaults = [f"{self.name} {number} left", f"{self.name} {number} right"]
        if len(given) != len(found):
            raise BadRowError("not two image_ids", reprlib.repr(given))
        ids = [text_of(value, "image_id") for value in given]
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
        if has_encoded_images(file.path, self.task):
            table = load_dataset("parquet", data_files=str(file.path), split="train", cache_dir=self.cache_dir)
            return self.read_table(table, name, check)
        folder = file.path.parent if image_root is None else Path(image_root)
        make_rows = _RowMaker(self.task, name, ImageFinder(self.task, folder, check))
        return _as_dataset(self.good_rows(read_annotations(file, self.task.name), make_rows, name), self.task.features)

    def read_embedded(self, records: Iterable[dict], name: str) -> Dataset:
        make_known_rows = _RowMaker(self.task, name, ImageFinder(self.task, Path(), self.image_check))

        def make_rows(number: int, record: dict) -> list[dict]:
            extra = {"target_box": record["target_box"]} if "target_box" in record else {}
            return [{**row, **extra} for row in make_known_rows(number, record)]

        rows = self.good_rows(enumerate(records, start=1), make_rows, name)
        return _as_dataset(rows, SCENE_FEATURES if rows and "target_box" in rows[0] else self.task.features)

    def read_hub(self, table: Dataset, name: str) -> Dataset:
        # Boxes are checked against the size of their image.
        return self.read_table(table, name, self.image_check or ("header" if self.task.name == "grounding" else None))

    def read_table(self, table: Dataset, name: str, check: str | None) -> Dataset:
        images = images_of_table(table, self.task, name)
        make_known_rows = _RowMaker(self.task, name, TableImageFinder(images, self.task, check))
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


# Tokenizer
