"""Loading of data sets in one schema per task: files, data sets on the Hub or on disk, and bundled synthetic data."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from accelerate.utils import tqdm
from datasets import Dataset, DatasetDict, Features, NamedSplit, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from trips_examples.data.annotations import read_annotations
from trips_examples.data.busy_scenes import busy_records
from trips_examples.data.checking import RowReader, stamp_of
from trips_examples.data.source import BUNDLED, SPLIT_OPTIONS, AnnotationFile, DataSource
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
        patch_size (`int`, *optional*, defaults to 1): Shortest usable side of an image in pixels.
        seed (`int`, *optional*, defaults to 0): Seed of the scenes.
        faults (`list[Fault]`, *optional*): List that receives the faults. Bad rows are then left out.

    Returns:
        `DatasetDict`: Splits with the columns of `TASKS[task].features`.

    Raises:
        `ValueError`: Rows cannot be used (the message names the first few), or the arguments contradict each other.
        `FileNotFoundError`: A file or `image_root` does not exist.
    """
    source = source or DataSource()
    source.check(task)
    if source.is_bundled:
        return _bundled(task, source, seed)
    data = {}
    for split, part, root, records in _tables(task, source):
        data[split], of_split = RowReader(TASKS[task], part, root, patch_size).rows_and_faults(records)
        if faults is not None:
            faults += of_split
            continue
        settle(of_split, part, len(records), skip_bad_rows)
        if not len(data[split]):
            raise ValueError(f"{part} has no row that can be used: it needs the columns {TASKS[task].needs}.")
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


def _tables(task: str, source: DataSource) -> Iterator[tuple[str, str, str, Dataset]]:
    """
    Yield each split, its name in messages, the folder that paths of images are relative to, and its records. A data
    set without a training split is for evaluation. Its test split must be requested by name, because public test
    splits often lack answers.
    """
    if source.files:
        for split, file in source.files.items():
            yield split, file.path.name, str(file.folder), _records(file, task)
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
