"""Loading of data sets in one schema per task: files, data sets on the Hub or on disk, and bundled synthetic data."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow
from accelerate.utils import tqdm
from datasets import Dataset, DatasetDict, Features, NamedSplit, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from trips_examples.data.annotations import read_annotations
from trips_examples.data.busy_scenes import busy_records
from trips_examples.data.checking import RowReader, stamp_of
from trips_examples.data.source import BUNDLED, AnnotationFile, DataSource
from trips_examples.data.tasks import TASKS, Fault, settle


RECORD = Features({"row": Value("int64"), "json": Value("string")})


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
