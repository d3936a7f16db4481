"""The source of a task's data, in options that scripts read before they import what takes seconds."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trips_examples.data.busy_scenes import CELL_SIZE, NUM_ITEMS


if TYPE_CHECKING:
    from datasets import DatasetDict


BUNDLED = "busy_scenes"
SPLIT_OPTIONS = "--train_split, --validation_split or --test_split"


def option(default, text: str, **metadata):
    """
    Return the field of an option with its help and further `metadata`, such as `choices`. `MISSING` makes it required;
    a list is a new one for each object.
    """
    metadata["help"] = text
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_is_file(name: str, path: str | Path):
    """Raise a `FileNotFoundError` if the file of the option `--name` does not exist."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--{name} {path}: there is no such file.")


@dataclass
class DataArguments:
    """
    The source of a task's data: files, a data set on the Hub or on disk, or bundled scenes.

    - Files are JSON (a list of objects, or one object per line), JSONL, CSV or Parquet, in UTF-8. In CSV, lists are
      JSON lists or texts separated by `|`. Rows count from 1, without the header of CSV. An image is a path, or in
      Parquet also bytes or a struct of `bytes` and `path`. By default, rows of one path or of equal bytes have one
      `image_id`. docs/data.md has the columns of each task.
    - `dataset_name` is a data set with the same columns: on the Hub, a folder that `load_dataset` reads (as of
      `imagefolder`), or one that `save_to_disk` has written.
    - Bundled scenes, `dataset_name="busy_scenes"`, are the default, see `busy_records`.
    """

    _argument_group_name = "data"

    dataset_name: str | None = option(None, "Data set on the Hub, folder, or busy_scenes (default without files).")
    dataset_config_name: str | None = option(None, "Configuration of the Hub data set.")
    train_file: str | None = option(None, "JSON, JSONL, CSV or Parquet: see docs/data.md.")
    validation_file: str | None = option(None, "Like --train_file.")
    test_file: str | None = option(None, "Like --train_file, for the reported metrics.")
    train_split: str | None = option(None, "Split of --dataset_name. Default: train.")
    validation_split: str | None = option(None, "Like --train_split. Default: validation.")
    test_split: str | None = option(None, "Like --train_split. Default: none.")
    image_root: str | None = option(None, "Folder that image paths are relative to. Default: that of their file.")
    grid: int = option(4, "Cells per side of a bundled scene, 1 to 4.")
    train_scenes: int = option(4000, "Number of training scenes.")
    validation_scenes: int = option(1000, "Number of validation scenes.")
    test_scenes: int | None = option(None, "Default: as many as --validation_scenes.")
    columns: list[str] = option([], "Own names of columns: image=Bild question=Frage answer=Antwort.")
    skip_bad_rows: bool = option(False, "Skip and count unusable rows instead of stopping.")
    max_train_samples: int | None = option(None, "Truncate the training split.")
    max_eval_samples: int | None = option(None, "Truncate the validation and test splits.")

    @property
    def splits(self) -> dict[str, str | None]:
        """The requested split of the source for each split, or None."""
        return {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}

    @property
    def files(self) -> dict[str, Path]:
        """The file of each split that has one."""
        names = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: Path(name) for split, name in names.items() if name is not None}

    @property
    def num_scenes(self) -> dict[str, int]:
        """The number of scenes of each split."""
        test_scenes = self.validation_scenes if self.test_scenes is None else self.test_scenes
        return {"train": self.train_scenes, "validation": self.validation_scenes, "test": test_scenes}

    @property
    def own_columns(self) -> dict[str, str]:
        """The names of the columns in the data by those of the task."""
        return dict(pair.split("=", 1) for pair in self.columns)

    @property
    def is_bundled(self) -> bool:
        """True for the bundled scenes."""
        return not self.files and self.dataset_name in (None, BUNDLED)

    @property
    def scene_size(self) -> int | None:
        """The side of the bundled scenes in pixels, or None for other data."""
        return CELL_SIZE * self.grid if self.is_bundled else None

    def check_files(self):
        """Raise a `ValueError` if options contradict each other, or a `FileNotFoundError` for a missing file."""
        if not all("=" in pair for pair in self.columns):
            raise ValueError(f"columns must be pairs as image=Bild, got {' '.join(self.columns)}.")
        if self.files and self.dataset_name is not None:
            raise ValueError(f"dataset_name is {self.dataset_name!r}, but there are files as well. Give one.")
        if self.image_root is not None and not self.files:
            raise ValueError("image_root needs train_file, validation_file or test_file. Give one of them.")
        for split, file in self.files.items():
            check_is_file(f"{split}_file", file)
        if self.image_root is not None and not Path(self.image_root).is_dir():
            raise FileNotFoundError(f"The folder {self.image_root} does not exist. Correct image_root.")

    def check(self, task: str):
        """Check the options before any data is read: `check_files`, and whether a task's scenes can be drawn."""
        self.check_files()
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}.")
        chosen = [f"{split}_split" for split, part in self.splits.items() if part is not None]
        if chosen and (self.files or self.is_bundled):
            raise ValueError(f"Files and {BUNDLED} have their own splits. Leave out {' and '.join(chosen)}.")
        if not self.is_bundled:
            return
        fewest = 2 if task == "nlvr2" else 1  # statements name what both images have, and what one of them has
        if not fewest <= self.grid <= max(NUM_ITEMS):
            raise ValueError(f"grid is {self.grid}: choose {fewest} to {max(NUM_ITEMS)} cells per side of a scene.")
        if min(self.num_scenes.values()) < 1:
            raise ValueError("train_scenes, validation_scenes and test_scenes must be at least 1.")

    def vocabulary(self, data: "DatasetDict", *columns: str) -> Iterator[str]:
        """Yield the texts to train a tokenizer on: these columns, or for bundled scenes the words of all tasks."""
        from trips_examples.data.images import texts_of_column
        from trips_examples.data.vocabulary import BUNDLED_WORDS

        if self.is_bundled:
            yield from BUNDLED_WORDS
            return
        dataset = data["train"] if "train" in data else data["validation"]
        for column in columns:
            yield from texts_of_column(dataset, column)
