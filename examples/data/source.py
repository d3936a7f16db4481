"""The source of a task's data, in options that scripts read before they import what takes seconds."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trips_examples.data.busy_scenes import check_busy_scenes


SPLITS = ("train", "validation", "test")
BUNDLED = "busy_scenes"


def existing_file(path: Path) -> Path:
    """Return the path of a file. Raise a `FileNotFoundError` if it does not exist."""
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder. Give a file, or a saved data set with --dataset_name.")
    if not path.is_file():
        raise FileNotFoundError(f"The file {path} does not exist.")
    return path


@dataclass(frozen=True)
class AnnotationFile:
    """
    A file of annotations and the options for reading it.

    Args:
        path (`Path`)
        default_split (`str`): Split to read from a file with several splits: `"train"`, `"val"` or `"test"`.
        split (`str`, *optional*): Replaces `default_split`. A file without splits is then an error.
        image_root (`Path`, *optional*): Folder that paths of images are relative to. Default: the folder of the file.
    """

    path: Path
    default_split: str
    split: str | None = None
    image_root: Path | None = None

    @property
    def folder(self) -> Path:
        return self.image_root or self.path.parent

    @property
    def second_path(self) -> Path:
        """The file that VQAv2's questions and RefCOCO's refs need, with its official name."""
        is_json = self.path.suffix.lower() == ".json"
        name = self.path.name.replace("OpenEnded_", "").replace("questions", "annotations")
        return self.path.with_name(name if is_json else "instances.json")

    @property
    def split_option(self) -> str:
        return f"--{'validation' if self.default_split == 'val' else self.default_split}_split"

    def of_split(self, items: list[dict], split_of: Callable[[dict], str]) -> list[tuple[int, dict]]:
        """Return the items of the requested split and their numbers in the file."""
        wanted = self.split or self.default_split
        numbered = [(number, item) for number, item in enumerate(items, start=1) if split_of(item) == wanted]
        if not numbered:
            only = ", ".join(f"{split} ({count})" for split, count in Counter(map(split_of, items)).items())
            raise ValueError(f"{self.path} has no split {wanted!r}, only {only}. Choose one with {self.split_option}.")
        return numbered

    def first_path(self, *paths: str) -> str:
        """Return the first of several possible paths of an image that exists, or the first one."""
        return str(next((path for path in map(Path, paths) if (self.folder / path).is_file()), Path(paths[0])))


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

    def check_files(self):
        """
        Raises:
            `ValueError`: Options contradict each other.
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
