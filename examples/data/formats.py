"""Files in, as numbered records: JSON, JSONL, CSV, Parquet, and the annotation files of public data sets as they are.

Public formats are told by what is in the file, never by its name; their records come out in the columns that
`example_datasets.load_task_dataset` reads:

| data set | file | task |
|---|---|---|
| VQAv2 | questions, with the file of annotations | `"vqa"` |
| COCO | `captions_train2014.json` | `"captions"` |
| COCO, Flickr8k, Flickr30k as split by Karpathy | `dataset_coco.json` | `"captions"` |
| NLVR2 | `train.json` | `"nlvr2"` |
| RefCOCO, RefCOCO+, RefCOCOg | `refs(unc).p`, with `instances.json` | `"grounding"` |
| ALBEF's lists | captions, questions, NLVR2; RefCOCO with `refs(unc).p` | as their names say |
"""

import codecs
import csv
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet


class BadRowError(ValueError):
    """
    A row that cannot be used.

    Args:
        reason (`str`): What is wrong, in words that are the same for all rows with the same fault.
        detail (`str`, *optional*, defaults to `""`): The value at fault.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


# Files of any data


NumberedRecords = Iterator[tuple[int, dict | BadRowError]]


def read_records(file: Path) -> NumberedRecords:
    """
    Yields the records of a file with their numbers, counted from 1: the lines of JSONL, the items of a JSON list, the
    records of CSV (without the header) and of Parquet. A line that is no record is yielded as the error it is.

    Raises:
        `FileNotFoundError`: Where there is no such file.
        `ValueError`: Where the file as a whole cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    readers = {".json": _read_json, ".jsonl": _read_json_lines, ".csv": _read_csv, ".parquet": _read_parquet}
    if (suffix := file.suffix.lower()) not in readers:
        raise ValueError(f"{file} ends with {suffix!r}: convert it to one of {', '.join(readers)}.")
    try:
        yield from readers[suffix](file)
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{file} is no valid {suffix} file: {error}. Mend or convert it.") from error


def _as_record(value: Any) -> dict | BadRowError:
    return value if isinstance(value, dict) else BadRowError("not a JSON object", reprlib.repr(value))


def _read_json(file: Path) -> NumberedRecords:
    content = file.read_bytes()
    if not content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return _read_json_lines(file)
    return ((number, _as_record(value)) for number, value in enumerate(json.loads(content), start=1))


def _read_json_lines(file: Path) -> NumberedRecords:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, _as_record(json.loads(line))
            except json.JSONDecodeError as error:
                yield number, BadRowError("broken JSON", f"{error.msg} at column {error.colno}")
            except UnicodeDecodeError as error:
                yield number, BadRowError("not UTF-8", str(error))


def _read_csv(file: Path) -> NumberedRecords:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, record in enumerate(csv.DictReader(lines), start=1):
            if surplus := record.get(None):
                yield number, BadRowError("more cells than the header", f"{surplus}: quote cells that have commas")
            else:
                yield number, record


def _read_parquet(file: Path) -> NumberedRecords:
    with pyarrow.parquet.ParquetFile(file) as table:
        yield from enumerate((row for batch in table.iter_batches() for row in batch.to_pylist()), start=1)


# Annotation files of public data sets


# VQAv2 (https://visualqa.org/vqa_v2_format.html)


# COCO (https://cocodataset.org/#format-data)


# The splits of Karpathy (https://cs.stanford.edu/people/karpathy/deepimagesent/)


# RefCOCO, RefCOCO+, RefCOCOg (https://github.com/lichengunc/refer)


# Lists of rows: our own columns, those of NLVR2 (https://github.com/lil-lab/nlvr), and those of ALBEF
