"""Conversion of records to rows of a task's schema, and to splits."""

import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, Image, Sequence, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.utils import tqdm

from trips_examples.data.annotations import AnnotationFile, read_annotations
from trips_examples.data.faults import BadRowError, BadRows, Fault
from trips_examples.data.images import Found, ImageFinder, has_encoded_images, images_of_table
from trips_examples.data.tasks import BOX_COLUMNS, Task, has_area, is_missing, list_of, text_of


class RowMaker:
    """
    Converter from records to the rows of a split.

    Args:
        task (`Task`)
        name (`str`): Name of the split, for `source` and errors.
        find_images (`Callable[[dict], list[Found]]`): Finds the images of a record.
    """

    def __init__(self, task: Task, name: str, find_images: Callable[[dict], list[Found]]):
        self.task, self.name, self.find_images = task, name, find_images
        self.path_of_id: dict[str, str] = {}

    def __call__(self, number: int, record: dict) -> list[dict]:
        texts = self.task.read_texts(record)
        found = self.find_images(record)
        images, image_ids = [image for image, _, _ in found], self.image_ids(number, record, found)
        if self.task.image_column == "image":
            shared = {"image": images[0], "image_id": image_ids[0]}
        else:
            shared = {"images": images, "image_ids": image_ids}
        shared["source"] = f"{self.name} row {number}"
        for row in texts:
            if "question_id" in row:
                row["question_id"] = row["question_id"] or str(number)
            for column in BOX_COLUMNS & row.keys():
                if row[column] is not None and found[0].size is not None:
                    row[column] = _within(row[column], found[0].size, column)
        return [{**shared, **row} for row in texts]

    def image_ids(self, number: int, record: dict, found: list[Found]) -> list[str]:
        if self.task.image_column == "image":
            given, defaults = [record.get("image_id")], [f"{self.name} {number}"]
        else:
            given = record.get("image_ids")
            given = [None, None] if is_missing(given) else list_of(given, "image_ids")
            defaults = [f"{self.name} {number} left", f"{self.name} {number} right"]
        if len(given) != len(found):
            raise BadRowError("not two image_ids", reprlib.repr(given))
        ids = [text_of(value, "image_id") for value in given]
        ids = [id or image.path or default for id, image, default in zip(ids, found, defaults)]
        for id, image in zip(ids, found):
            if self.path_of_id.setdefault(id, image.path) != image.path:
                raise BadRowError("image_id of two images", f"{id}: {self.path_of_id[id]} and {image.path}")
        return ids


def _within(box: list[float], size: tuple[int, int], column: str) -> list[float]:
    """Clip a box to the image. Rounded corners may be off by up to a pixel."""
    limits = [*size, *size]
    cut = [min(max(value, 0.0), float(limit)) for value, limit in zip(box, limits)]
    is_near = all(-1 <= value <= limit + 1 for value, limit in zip(box, limits))
    if not (is_near and has_area(cut)):
        detail = f"[x0, y0, x1, y1] = {box}, the image is {size[0]} x {size[1]}"
        raise BadRowError(f"{column} outside the image", detail)
    return cut


@dataclass(frozen=True)
class SplitReader:
    """
    Reader of the splits of a task.

    Args:
        task (`Task`)
        bad_rows (`BadRows`): Options for rows that cannot be used.
        cache_dir (`str`, *optional*): Folder for tables with images.
    """

    task: Task
    bad_rows: BadRows
    cache_dir: str | None = None

    @property
    def image_check(self) -> str:
        return self.bad_rows.image_check or ("decode" if self.bad_rows.skip else "verify")

    def read_file(self, file: AnnotationFile, image_root: str | Path | None) -> Dataset:
        name = file.path.name
        if has_encoded_images(file.path, self.task):
            return self.read_table(self._parquet(file.path), name)
        folder = file.path.parent if image_root is None else Path(image_root)
        find_images = ImageFinder(self.task, folder, self.image_check, self.bad_rows.patch_size)
        make_rows = RowMaker(self.task, name, find_images)
        return as_dataset(self.good_rows(read_annotations(file, self.task.name), make_rows, name), self.task.features)

    def _parquet(self, file: Path) -> Dataset:
        try:
            return load_dataset("parquet", data_files=str(file), split="train", cache_dir=self.cache_dir)
        except DatasetGenerationError as error:
            raise ValueError(
                f"{file} is not a valid .parquet file: {error.__cause__}. Repair or convert it."
            ) from error

    def read_embedded(self, records: Iterable[dict], name: str) -> Dataset:
        check, patch_size = self.bad_rows.image_check, self.bad_rows.patch_size
        make_rows = RowMaker(self.task, name, ImageFinder(self.task, Path(), check, patch_size))
        return as_dataset(self.good_rows(enumerate(records, start=1), make_rows, name), self.task.features)

    def read_table(self, table: Dataset, name: str) -> Dataset:
        """Read a table that holds its images. The images are checked and stay in the table."""
        column = self.task.image_column
        images = images_of_table(table, self.task, name)
        texts = table.select_columns([column for column in table.column_names if column in self.task.columns])
        records = concatenate_datasets([texts, images], axis=1)
        encoded = Image(decode=False)
        records = records.cast_column(column, encoded if column == "image" else Sequence(encoded))
        find_images = ImageFinder(self.task, Path(), self.image_check, self.bad_rows.patch_size)
        make_whole_rows, indices = RowMaker(self.task, name, find_images), []

        def make_rows(number: int, record: dict) -> list[dict]:
            rows = make_whole_rows(number, record)
            indices.extend([number - 1] * len(rows))
            return [{key: value for key, value in row.items() if key != column} for row in rows]

        rows = self.good_rows(enumerate(records, start=1), make_rows, name)
        features = {key: feature for key, feature in self.task.features.items() if key != column}
        rows = as_dataset(rows, Features(features))
        return concatenate_datasets([images.select(indices), rows], axis=1).select_columns(list(self.task.features))

    def good_rows(
        self,
        records: Iterable[tuple[int, dict | BadRowError]],
        make_rows: Callable[[int, dict], list[dict]],
        name: str,
    ) -> list[dict]:
        """Return the rows of all records. Records of invalid lines are errors."""
        rows, faults, total = [], [], 0
        for number, record in tqdm(records, desc=f"Reading {name}", unit=" rows"):
            total += 1
            try:
                if isinstance(record, BadRowError):
                    raise record
                rows += make_rows(number, record)
            except BadRowError as error:
                faults.append(Fault(f"{name} row {number}", error.reason, error.detail))
        self.bad_rows.settle(faults, name, total)
        if not rows and self.bad_rows.collected is None:
            raise ValueError(f"{name} has no row that can be used: it needs the columns {self.task.needs}.")
        return rows


def as_dataset(rows: list[dict], features: Features) -> Dataset:
    """Return rows as a data set, which may be empty."""
    return Dataset.from_dict({column: [row[column] for row in rows] for column in features}, features=features)
