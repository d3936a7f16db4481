"""Loading of data sets in one schema per task: files, the Hub, easy-VQA and composed scenes."""

from datasets import DatasetDict, load_dataset

from trips_examples.data.faults import BadRows
from trips_examples.data.scenes import SPLITS, easy_vqa_records, scene_records
from trips_examples.data.source import EMBEDDED_DATASETS, DataSource
from trips_examples.data.splits import SplitReader
from trips_examples.data.tasks import TASKS


def load_task_dataset(
    task: str, source: DataSource | None = None, bad_rows: BadRows | None = None, seed: int = 0
) -> DatasetDict:
    """
    Load the data of a task, with the same columns from any source. Rows are checked when they are read.

    Args:
        task (`str`): `"vqa"`, `"captions"` (for retrieval, captioning and pre-training), `"nlvr2"` or `"grounding"`.
        source ([`DataSource`], *optional*): Source of the data. Default: the bundled synthetic data.
        bad_rows ([`BadRows`], *optional*): Options for rows that cannot be used. Default: they raise an error.
        seed (`int`, *optional*, defaults to 0): Seed of the scenes.

    Returns:
        `DatasetDict`: Splits with the columns of `TASKS[task].features`.

    Raises:
        `ValueError`: Rows cannot be used (the message names the first few), or the arguments contradict each other.
        `FileNotFoundError`: A file or `image_root` does not exist.
        `ImportError`: The package easy-vqa is needed and missing.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
    source = source or DataSource()
    source.check(task)
    reader = SplitReader(TASKS[task], bad_rows or BadRows(), source.cache_dir)
    if files := source.files:
        return DatasetDict({split: reader.read_file(file, source.image_root) for split, file in files.items()})
    name = source.name_for(task)
    if name in EMBEDDED_DATASETS:
        if name == "easy_vqa":
            records = {split: easy_vqa_records(split) for split in SPLITS}
        else:
            scenes = source.num_scenes.items()
            records = {split: scene_records(task, split, number, source.grid, seed) for split, number in scenes}
        return DatasetDict({split: reader.read_embedded(part, f"{name} {split}") for split, part in records.items()})
    hub = load_dataset(name, source.dataset_config_name, cache_dir=source.cache_dir)
    splits = _hub_splits(hub, name, source.splits)
    return DatasetDict({split: reader.read_table(hub[part], f"{name} {part}") for split, part in splits})


def _hub_splits(hub: DatasetDict, name: str, splits: dict[str, str | None]) -> list[tuple[str, str]]:
    """
    Return pairs of split names: this project's and the data set's. A data set without a training split is for
    evaluation. The test split must be requested by name, because public test splits often lack answers.
    """
    defaults = {"train", "validation"} if "train" in hub else {"validation"}
    parts = [(split, part or split) for split, part in splits.items() if part or split in defaults]
    if missing := {part for _, part in parts} - hub.keys():
        raise ValueError(
            f"{name} has no split {sorted(missing)}, only {sorted(hub)}. Choose with train_split and "
            "validation_split, or choose another data set or configuration."
        )
    return parts
