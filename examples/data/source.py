"""The source of a task's data, as options."""

from dataclasses import dataclass, field
from pathlib import Path

from trips_examples.data.annotations import AnnotationFile
from trips_examples.data.formats import existing_file
from trips_examples.data.scenes import check_scenes


EMBEDDED_DATASETS = ("easy_vqa", "easy_vqa_scenes")


@dataclass
class DataSource:
    """
    The source of a task's data: files, a data set on the Hub, or bundled data made of easy-VQA.

    **Files** are JSON (a list of objects, or one object per line), JSONL, CSV or Parquet, in UTF-8. Rows count from 1:
    the lines of JSONL, the items of a JSON list, the records of CSV (without the header) and of Parquet. In CSV, lists
    are JSON lists or texts separated by `|`. Columns by task:

    - `"vqa"`: `image`, `question`, and `answer` (one) or `answers` (a list; blank ones are dropped)
    - `"captions"`: `image`, and `caption` (one) or `captions` (a list, one row each)
    - `"nlvr2"`: `images` (two) or `left_image` and `right_image`; `statement`; `label` (1, 0, true or false)
    - `"grounding"`: `image`, `expression`, `box` ([x0, y0, x1, y1] in pixels, at most one pixel outside the image, and
      clipped to it)

    An `image` is a path, in Parquet also the encoded image, as bytes or as a struct of `bytes` and `path`. `image_id`
    (`image_ids` for `"nlvr2"`) and `question_id` are optional. Annotation files of VQAv2, COCO, Flickr30k, NLVR2,
    RefCOCO and ALBEF are supported, see `annotations`; their rows count from 1 in the list of questions, captions,
    images or refs. One of `train_file` and `validation_file` is enough. Second files are VQAv2's annotations,
    RefCOCO's `instances.json`, or RefCOCO's `refs(unc).p` for a list of ALBEF.

    **The Hub**: `dataset_name` is a data set with the same columns.

    **Bundled**: `dataset_name="easy_vqa"`, the default of `"vqa"`, is easy-VQA with its official test split; a tenth
    of its training images is the split `validation`. `"easy_vqa_scenes"`, the default of the other tasks, are composed
    scenes of its images, see `scene_records`; for `"nlvr2"` the numbers of scenes are numbers of statements.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "easy_vqa, easy_vqa_scenes, or a data set on the Hub."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    train_file: str | None = field(
        default=None, metadata={"help": "JSON, JSONL, CSV, Parquet, or a public annotation file: see docs/data.md."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Like --train_file."})
    train_annotations: str | None = field(
        default=None, metadata={"help": "Second file of VQAv2 and RefCOCO. Default: the file with the official name."}
    )
    validation_annotations: str | None = field(default=None, metadata={"help": "Like --train_annotations."})
    test_file: str | None = field(default=None, metadata={"help": "Like --train_file, for the reported metrics."})
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
    grid: int | None = field(
        default=None, metadata={"help": "Tiles per side of an easy_vqa_scenes image. Default: 2; NLVR2: 1."}
    )
    train_scenes: int = field(default=4000, metadata={"help": "Number of training scenes."})
    validation_scenes: int = field(default=1000, metadata={"help": "Number of validation scenes."})
    test_scenes: int | None = field(default=None, metadata={"help": "Default: as many as --validation_scenes."})
    cache_dir: str | None = field(default=None, metadata={"help": "Cache of the datasets library."})

    @property
    def splits(self) -> dict[str, str | None]:
        """The requested split of the source for each split, or None."""
        return {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}

    @property
    def files(self) -> dict[str, AnnotationFile]:
        """The file of each split that has one."""
        files = {
            "train": AnnotationFile.of(self.train_file, self.train_annotations, "train", self.train_split),
            "validation": AnnotationFile.of(
                self.validation_file, self.validation_annotations, "val", self.validation_split
            ),
            "test": AnnotationFile.of(self.test_file, self.test_annotations, "test", self.test_split),
        }
        return {split: file for split, file in files.items() if file is not None}

    @property
    def num_scenes(self) -> dict[str, int]:
        """The number of scenes of each split."""
        test_scenes = self.validation_scenes if self.test_scenes is None else self.test_scenes
        return {"train": self.train_scenes, "validation": self.validation_scenes, "test": test_scenes}

    def name_for(self, task: str) -> str:
        """Return the name of the data set, or the default of the task."""
        return self.dataset_name or ("easy_vqa" if task == "vqa" else "easy_vqa_scenes")

    def check(self, task: str):
        """
        Check the options before any data is read.

        Raises:
            `ValueError`: Options contradict each other or the task.
            `FileNotFoundError`: A file or `image_root` does not exist.
        """
        files = self.files
        if files and self.dataset_name is not None:
            raise ValueError(
                f"dataset_name is {self.dataset_name!r}, but there are files as well ({sorted(files)}). Give one or "
                "the other."
            )
        if self.image_root is not None and not files:
            root = str(self.image_root)
            raise ValueError(f"image_root (is {root!r}) needs train_file or validation_file. Give one of them.")
        for file in files.values():
            existing_file(file.path)
        if self.image_root is not None and not Path(self.image_root).is_dir():
            raise FileNotFoundError(f"The folder {self.image_root} does not exist. Correct image_root.")
        if not files and self.name_for(task) in EMBEDDED_DATASETS:
            self._check_embedded(self.name_for(task), task)

    def _check_embedded(self, name: str, task: str):
        if chosen := [f"{split}_split" for split, part in self.splits.items() if part is not None]:
            raise ValueError(f"{name} has its own splits. Leave out {' and '.join(chosen)}.")
        if name == "easy_vqa" and task != "vqa":
            raise ValueError(f"easy_vqa does not support {task}. Use easy_vqa_scenes.")
        if name == "easy_vqa_scenes":
            for split, number in self.num_scenes.items():
                check_scenes(task, split, number, self.grid)
