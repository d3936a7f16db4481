"""Records of files: JSON, JSONL, CSV and Parquet.

`datasets.load_dataset` is used for tables that hold images. It would shift the columns of a CSV file with unquoted
commas, convert cells such as `none` and `01`, and reject a whole file for one invalid line, so texts are read here.
"""

import codecs
import csv
import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from trips_examples.data.tasks import BadRowError


# A record, or the JSON text of one, with its number from 1: lines of JSONL, items of a list, records of a table.
NumberedRecords = Iterator[tuple[int, dict | str]]

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


def parsed_record(record: dict | str) -> dict:
    """Return a record, parsed if it is JSON. Raise a `BadRowError` if it is not a JSON object."""
    if isinstance(record, dict):
        return record
    try:
        value = json.loads(record, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise BadRowError("broken JSON", str(error).partition(";")[0]) from error
    if not isinstance(value, dict):
        raise BadRowError("not a JSON object", reprlib.repr(value))
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    _refuse_repeated([key for key, _ in pairs])
    return dict(pairs)


def _refuse_repeated(names: Sequence[str]):
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"the key or column {repeated[0]!r} occurs twice")


def read_records(file: Path) -> NumberedRecords:
    """Yield the records of a JSON, JSONL, CSV or Parquet file. Raise a `ValueError` if it cannot be read."""
    readers = {".json": _read_json, ".jsonl": _read_json_lines, ".csv": _read_csv, ".parquet": _read_parquet}
    if (suffix := file.suffix.lower()) not in readers:
        raise ValueError(f"{file} ends with {suffix!r}. Convert it to one of {', '.join(readers)}.")
    try:
        yield from readers[suffix](file)
    # pyarrow raises several types of errors, including OSError.
    except (ValueError, RecursionError, csv.Error, pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a valid {suffix} file: {error}. Repair or convert it.") from error


def _read_json(file: Path) -> NumberedRecords:
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    if content.lstrip().startswith(b"["):
        return enumerate(map(json.dumps, json.loads(content, object_pairs_hook=_unique_keys)), start=1)
    return _read_json_lines(file)


def _read_json_lines(file: Path) -> NumberedRecords:
    with file.open(encoding="utf-8-sig") as lines:
        yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _read_csv(file: Path) -> NumberedRecords:
    number = 0
    with file.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines, strict=True)
        try:
            _refuse_repeated(table.fieldnames or ())
            for number, record in enumerate(table, start=1):
                if None in record:
                    raise ValueError(f"row {number} has more cells than the header; quote cells that have commas")
                if row := next(filter(None, map(_row_within, record.values())), None):
                    raise ValueError(f"a cell of row {number} holds a whole row, {row!r}; correct its quotes")
                yield number, record
        except csv.Error as error:
            raise ValueError(f"row {number + 1}: {error}; correct its quotes") from error


def _row_within(cell: str | None) -> str | None:
    """Return a line of a cell of CSV that has an image file among its cells: a row that stray quotes swallowed."""
    image = re.compile(rf".*\.({'|'.join(IMAGE_SUFFIXES)}) *\"?(,|$)", re.IGNORECASE)
    return next((line for line in (cell or "").splitlines()[1:] if "," in line and image.match(line)), None)


def _read_parquet(file: Path) -> NumberedRecords:
    with pyarrow.parquet.ParquetFile(file) as table:
        batches = table.iter_batches(256)  # rows may hold images
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
