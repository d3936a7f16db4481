"""The source of a task's data, in options that scripts read before they import what takes seconds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trips_examples.data.busy_scenes import check_busy_scenes


if TYPE_CHECKING:
    from trips_examples.data.annotations import AnnotationFile

SPLITS = ("train", "validation", "test")
BUNDLED = "busy_scenes"


def existing_file(path: Path) -> Path:
    """Return the path of a file. Raise a `FileNotFoundError` if it does not exist."""
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder. Give a file, or a saved data set with --dataset_name.")
    if not path.is_file():
        raise FileNotFoundError(f"The file {path} does not exist.")
    return path


@dataclass
class DataSource:
    """
    The source of a task's data: files, a data set on the Hub or on disk, or bundled scenes.

    **Files** are JSON (a list of objects, or one object per line), JSONL, CSV or Parquet, in UTF-8. Rows count from 1:
    the lines of JSONL, the items of a JSON list, the records of CSV (without the header) and of Parquet. In CSV, lists
    are JSON lists or texts separated by `|`. Columns by task:

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
    train_annotations: str | None = field(
        default=None, metadata={"help": "Second file of VQAv2 and RefCOCO. Default: the file with the official name."}
    )
    validation_annotations: str | None = field(default=None, metadata={"help": "Like --train_annotations."})
    test_annotations: str | None = field(default=None, metadata={"help": "Like --train_annotations."})
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
    def files(self) -> "dict[str, AnnotationFile]":
        """The file of each split that has one."""
        from trips_examples.data.annotations import AnnotationFile  # takes seconds

        root = None if self.image_root is None else Path(self.image_root)
        files = {}
        for split in SPLITS:
            path, annotations = getattr(self, f"{split}_file"), getattr(self, f"{split}_annotations")
            second = None if annotations is None else Path(annotations)
            if path is not None:
                default_split = "val" if split == "validation" else split
                files[split] = AnnotationFile(Path(path), default_split, self.splits[split], second, root)
            elif annotations is not None:
                raise ValueError(f"{split}_annotations (is {str(annotations)!r}) goes with {split}_file. Give both.")
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

    def check_files(self):
        """
        Raises:
            `ValueError`: Options contradict each other.
            `FileNotFoundError`: A file or `image_root` does not exist.
        """
        paths = {
            split: getattr(self, f"{split}_file") for split in SPLITS if getattr(self, f"{split}_file") is not None
        }
        name, root = self.dataset_name, self.image_root
        if paths and name is not None:
            raise ValueError(f"dataset_name is {name!r}, but there are files as well ({sorted(paths)}). Give one.")
        if root is not None and not paths:
            raise ValueError(f"image_root (is {str(root)!r}) needs train_file or validation_file. Give one of them.")
        for path in paths.values():
            existing_file(Path(path))
        if root is not None and not Path(root).is_dir():
            raise FileNotFoundError(f"The folder {root} does not exist. Correct image_root.")

    def check(self, task: str):
        """
        Check the options before any data is read.

        Raises:
            `ValueError`: Options contradict each other or the task.
            `FileNotFoundError`: A file or `image_root` does not exist.
        """
        self.check_files()
        if not self.is_bundled:
            return
        if chosen := [f"{split}_split" for split, part in self.splits.items() if part is not None]:
            raise ValueError(f"{BUNDLED} has its own splits. Leave out {' and '.join(chosen)}.")
        check_busy_scenes(task, self.num_scenes.values(), self.grid)
