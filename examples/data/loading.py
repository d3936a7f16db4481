"""Loading of data sets in one schema per task: files, data sets on the Hub or on disk, and bundled synthetic data."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow
from accelerate.utils import tqdm
from datasets import Dataset, DatasetDict, Features, NamedSplit, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from trips_examples.data.annotations import AnnotationFile, existing_file, read_annotations
from trips_examples.data.busy_scenes import busy_records, check_busy_scenes
from trips_examples.data.checking import RowReader, stamp_of
from trips_examples.data.tasks import TASKS, Fault, settle


SPLITS = ("train", "validation", "test")
BUNDLED = "busy_scenes"
RECORD = Features({"row": Value("int64"), "json": Value("string")})


@dataclass
class DataSource:
    """
    The source of a task's data: files, a data set on the Hub or on disk, or bundled scenes.

    **Files** are JSON (a list of objects, or one object per line), JSONL, CSV or Parquet, in UTF-8. In CSV, lists are
    JSON lists or texts separated by `|`. Rows count from 1, without the header of CSV. Columns by task:

    - `"vqa"`: `image`, `question`, and `answer` (one) or `answers` (a list; blank ones are dropped)
    - `"captions"`: `image`, and `caption` (one) or `captions` (a list, one row each)
    - `"nlvr2"`: `images` (two) or `left_image` and `right_image`; `statement`; `label` (1, 0, true or false)
    - `"grounding"`: `image`, `expression`, `box` ([x0, y0, x1, y1] in pixels, at most one pixel outside the image, and
      clipped to it)

    An `image` is a path, in tables also the encoded image, as bytes or as a struct of `bytes` and `path`. `image_id`
    (`image_ids` for `"nlvr2"`) and `question_id` are optional. By default, rows of one path or of equal bytes have one
    `image_id`. Public annotation files are supported, see `annotations`.

    **Data sets**: `dataset_name` is a data set with the same columns: on the Hub, a folder that `load_dataset` reads
    (as of `imagefolder`), or one that `save_to_disk` has written.

    **Bundled**, and the default: `dataset_name="busy_scenes"`, scenes of six to eight shapes among clutter, with texts
    that need one of them, see `busy_records`. For `"nlvr2"` the numbers of scenes are numbers of pairs.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A data set on the Hub, its folder, or busy_scenes, the default without files."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    train_file: str | None = field(
        default=None, metadata={"help": "JSON, JSONL, CSV, Parquet, or a public annotation file: see docs/data.md."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Like --train_file."})
    test_file: str | None = field(default=None, metadata={"help": "Like --train_file, for the reported metrics."})
    train_split: str | None = field(
        default=None, metadata={"help": "Split of a file or Hub data set with several splits. Default: train."}
    )
    validation_split: str | None = field(
        default=None, metadata={"help": "Like --train_split. Default: val in files, validation on the Hub."}
    )
    test_split: str | None = field(
        default=None, metadata={"help": "Like --train_split. Default: test in files, none on the Hub."}
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder that image paths are relative to. Default: the folder of their file."}
    )
    grid: int = field(default=4, metadata={"help": "Cells per side of a bundled scene, 1 to 4."})
    train_scenes: int = field(default=4000, metadata={"help": "Number of training scenes."})
    validation_scenes: int = field(default=1000, metadata={"help": "Number of validation scenes."})
    test_scenes: int | None = field(default=None, metadata={"help": "Default: as many as --validation_scenes."})

    @property
    def splits(self) -> dict[str, str | None]:
        """The requested split of the source for each split, or None."""
        return {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}

    @property
    def files(self) -> dict[str, AnnotationFile]:
        """The file of each split that has one."""
        root = None if self.image_root is None else Path(self.image_root)
        files = {}
        for split in SPLITS:
            if (path := getattr(self, f"{split}_file")) is not None:
                default_split = "val" if split == "validation" else split
                files[split] = AnnotationFile(Path(path), default_split, self.splits[split], root)
        return files

    @property
    def num_scenes(self) -> dict[str, int]:
        """The number of scenes of each split."""
        test_scenes = self.validation_scenes if self.test_scenes is None else self.test_scenes
        return {"train": self.train_scenes, "validation": self.validation_scenes, "test": test_scenes}

    @property
    def is_bundled(self) -> bool:
        """True for the bundled scenes."""
        return not self.files and self.dataset_name in (None, BUNDLED)

    def check(self, task: str):
        """
        Check the options before any data is read.

        Raises:
            `ValueError`: Options contradict each other or the task.
            `FileNotFoundError`: A file or `image_root` does not exist.
        """
        files, name, root = self.files, self.dataset_name, self.image_root
        if files and name is not None:
            raise ValueError(f"dataset_name is {name!r}, but there are files as well ({sorted(files)}). Give one.")
        if root is not None and not files:
            raise ValueError(f"image_root (is {str(root)!r}) needs train_file or validation_file. Give one of them.")
        for file in files.values():
            existing_file(file.path)
        if root is not None and not Path(root).is_dir():
            raise FileNotFoundError(f"The folder {root} does not exist. Correct image_root.")
        if not self.is_bundled:
            return
        if chosen := [f"{split}_split" for split, part in self.splits.items() if part is not None]:
            raise ValueError(f"{BUNDLED} has its own splits. Leave out {' and '.join(chosen)}.")
        check_busy_scenes(task, self.num_scenes.values(), self.grid)


def load_task_dataset(
    task: str,
    source: DataSource | None = None,
    skip_bad_rows: bool = False,
    patch_size: int = 1,
    seed: int = 0,
    faults: list[Fault] | None = None,
) -> DatasetDict:
    """
    Load the data of a task, with the same columns from any source. Rows are checked, and images decoded once. The
    datasets library caches the result until a file or an image changes.

    Args:
        task (`str`): `"vqa"`, `"captions"` (for retrieval, captioning and pre-training), `"nlvr2"` or `"grounding"`.
        source ([`DataSource`], *optional*): Source of the data. Default: the bundled scenes.
        skip_bad_rows (`bool`, *optional*, defaults to `False`): Whether to skip rows that cannot be used, with a
            warning that counts them, instead of raising an error.
        patch_size (`int`, *optional*, defaults to 1): Side of the model's patches in pixels. Images with a shorter
            side cannot be used.
        seed (`int`, *optional*, defaults to 0): Seed of the scenes.
        faults (`list[Fault]`, *optional*): List that receives the faults. Bad rows, and files that cannot be read, are
            then left out.

    Returns:
        `DatasetDict`: Splits with the columns of `TASKS[task].features`.

    Raises:
        `ValueError`: Rows cannot be used (the message names the first few), or the arguments contradict each other.
        `FileNotFoundError`: A file or `image_root` does not exist.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
    source = source or DataSource()
    source.check(task)
    if source.is_bundled:
        return _bundled(task, source, seed)
    data = {}
    for split, (part, root, read_records) in _tables(task, source).items():
        try:
            records = read_records()
            data[split], of_split = RowReader(TASKS[task], part, root, patch_size).rows_and_faults(records)
            if faults is None:
                settle(of_split, part, len(records), skip_bad_rows)
                if not len(data[split]):
                    raise ValueError(f"{part} has no row that can be used: it needs the columns {TASKS[task].needs}.")
            else:
                faults += of_split
        except (ValueError, OSError) as error:
            if faults is None:
                raise
            faults.append(Fault(part, "cannot be read", str(error)))
    return DatasetDict(data)


def _bundled(task: str, source: DataSource, seed: int) -> DatasetDict:
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


def _tables(task: str, source: DataSource) -> dict[str, tuple[str, str, Callable[[], Dataset]]]:
    """Return a name of each split, the folder that paths of images are relative to, and a reader of its records."""
    if source.files:
        files = source.files.items()
        return {split: (file.path.name, str(file.folder), partial(_records, file, task)) for split, file in files}
    name = source.dataset_name
    if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):  # by save_to_disk
        table = load_from_disk(name)
        table = DatasetDict(train=table) if isinstance(table, Dataset) else table
    else:
        table = load_dataset(name, source.dataset_config_name)
    parts = _hub_splits(table, name, source.splits)
    return {split: (f"{name} {part}", "", partial(table.__getitem__, part)) for split, part in parts}


def _hub_splits(hub: DatasetDict, name: str, splits: dict[str, str | None]) -> list[tuple[str, str]]:
    """
    Return pairs of split names: this project's and the data set's. A data set without a training split is for
    evaluation. The test split must be requested by name, because public test splits often lack answers.
    """
    defaults = {"train", "validation"} & hub.keys() if "train" in hub else {"validation"}
    parts = [(split, part or split) for split, part in splits.items() if part or split in defaults]
    if missing := {part for _, part in parts} - hub.keys():
        raise ValueError(
            f"{name} has no split {sorted(missing)}, only {sorted(hub)}. Choose with train_split and "
            "validation_split, or choose another data set or configuration."
        )
    return parts


def _records(file: AnnotationFile, task: str) -> Dataset:
    """Return the records of a file: its columns if it is Parquet, else `RECORD`."""
    split = NamedSplit(file.default_split)
    try:
        if file.path.suffix.lower() == ".parquet":
            return load_dataset("parquet", data_files={split: str(file.path)}, split=split)
        stamps = [stamp_of(path.absolute()) for path in (file.path, file.second_path)]
        given = {"file": file, "task": task, "stamps": str(stamps)}
        return Dataset.from_generator(_numbered_json, features=RECORD, gen_kwargs=given, split=split)
    except (DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        if type(error.__cause__) in (FileNotFoundError, ValueError):  # of `read_annotations`
            raise error.__cause__ from None
        raise ValueError(f"{file.path} cannot be read: {error.__cause__ or error}. Repair or convert it.") from error


def _numbered_json(file: AnnotationFile, task: str, stamps: str) -> Iterator[dict]:
    """Yield the records of a file. `stamps` distinguish its versions in the cache."""
    row = None
    for row, record in read_annotations(file, task):
        yield {"row": row, "json": record if isinstance(record, str) else json.dumps(record)}
    if row is None:
        raise ValueError(f"{file.path} has no rows. It needs the columns {TASKS[task].needs}.")
