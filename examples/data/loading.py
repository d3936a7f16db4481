"""Data sets in, one schema per task: files, the Hub, easy-VQA, named pictures, and scenes made of either."""

from datasets import DatasetDict, load_dataset

from trips_examples.data.faults import BadRows
from trips_examples.data.picture_tasks import load_picture_scenes, load_pictures_alone
from trips_examples.data.scenes import SPLITS, easy_vqa_records, scene_records
from trips_examples.data.source import EMBEDDED_DATASETS, DataSource
from trips_examples.data.splits import SplitReader
from trips_examples.data.tasks import TASKS


def load_task_dataset(
    task: str, source: DataSource | None = None, bad_rows: BadRows | None = None, seed: int = 0
) -> DatasetDict:
    """
    Loads the data of a task. Whatever their origin, the splits, `train` and `validation`, have the columns of the
    task's schema. Rows are checked where they are read, so that bad ones are named before any training starts.

    Args:
        task (`str`): `"vqa"`, `"captions"` (for retrieval, captioning and pre-training), `"nlvr2"` or `"grounding"`.
        source ([`DataSource`], *optional*): Where the data come from. Default: what is made of easy-VQA.
        bad_rows ([`BadRows`], *optional*): What becomes of rows that cannot be used. Default: they are raised.
        seed (`int`, *optional*, defaults to 0): Seed of the scenes.

    Returns:
        `DatasetDict`: Splits with the columns of `TASKS[task].features`. Images of scenes of pictures are no column:
        they are made when rows are read.

    Raises:
        `ValueError`: Where rows cannot be used, naming the first few, or where the arguments contradict each other.
        `FileNotFoundError`: Where a file or `image_root` does not exist.
        `ImportError`: Where easy-VQA is asked for and its package is missing.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}: choose one of {', '.join(TASKS)}.")
    source = source or DataSource()
    source.check(task)
    reader = SplitReader(TASKS[task], bad_rows or BadRows(), source.cache_dir)
    if files := source.files:
        return DatasetDict({split: reader.read_file(file, source.image_root) for split, file in files.items()})
    name = source.name_for(task)
    if name in EMBEDDED_DATASETS:
        records = _embedded_records(task, source, seed)
        return DatasetDict({split: reader.read_embedded(part, f"{name} {split}") for split, part in records.items()})
    if name == "picture_scenes":
        first, last = source.pictures_per_scene
        return load_picture_scenes(
            task,
            source.pictures,
            source.num_scenes,
            source.scene_size,
            (first, last),
            source.held_out_names,
            reader.bad_rows,
            seed,
            source.question_kinds,
        )
    if name == "pictures":
        return load_pictures_alone(source.pictures, source.scene_size, source.held_out_names, reader.bad_rows)
    hub = load_dataset(name, source.dataset_config_name, cache_dir=source.cache_dir)
    splits = _hub_splits(hub, name, source.splits)
    return DatasetDict({split: reader.read_table(hub[part], f"{name} {part}") for split, part in splits})


def _embedded_records(task: str, source: DataSource, seed: int) -> dict:
    if source.name_for(task) == "easy_vqa":
        return {split: easy_vqa_records(split) for split in SPLITS}
    return {
        split: scene_records(task, split, number, source.grid, seed) for split, number in source.num_scenes.items()
    }


def _hub_splits(hub: DatasetDict, name: str, splits: dict[str, str | None]) -> list[tuple[str, str]]:
    """
    Pairs of our split and the data set's. One for evaluation has no training split. A test split is asked for by name:
    those of public data sets are often without answers.
    """
    defaults = {"train", "validation"} if "train" in hub else {"validation"}
    parts = [(split, part or split) for split, part in splits.items() if part or split in defaults]
    if missing := {part for _, part in parts} - hub.keys():
        raise ValueError(
            f"{name} has no split {sorted(missing)}, only {sorted(hub)}: choose with train_split and "
            "validation_split, or choose another data set or configuration."
        )
    return parts
