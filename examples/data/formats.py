"""
Numbered records of JSON, JSONL, CSV and Parquet files.

`datasets.load_dataset` stops at the first line that is not valid JSON, gives a column one type, and turns cells of CSV
such as `none` and `01` into other values. Here a bad line is named and can be skipped, and texts stay as they are.
"""

import codecs
import csv
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from trips_examples.data.faults import BadRowError


NumberedRecords = Iterator[tuple[int, dict | BadRowError]]

ROWS_PER_READ = 256  # of Parquet, which may hold images


def existing_file(path: Path) -> Path:
    """Return the path of a file; a `FileNotFoundError` if there is none."""
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder: give a file.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return path


def parsed_json(text: str | bytes) -> Any:
    """
    Parse JSON.

    Raises:
        `BadRowError`: Not valid JSON, not UTF-8, nested too deeply, or with a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"at column {error.colno}" if error.lineno == 1 else f"at line {error.lineno} column {error.colno}"
        raise BadRowError("broken JSON", f"{error.msg} {place}") from error
    except UnicodeDecodeError as error:
        raise BadRowError("not UTF-8", str(error)) from error
    except RecursionError as error:
        raise BadRowError("broken JSON", "nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise BadRowError("broken JSON", str(error).partition(";")[0]) from error


def read_records(file: Path) -> NumberedRecords:
    """
    Yield the records of a file with their numbers from 1: the lines of JSONL, the items of a JSON list, the records of
    CSV (without the header) and of Parquet. An invalid line is yielded as its error.

    Raises:
        `FileNotFoundError`: Where there is no such file.
        `ValueError`: Where the file as a whole cannot be read.
    """
    existing_file(file)
    readers = {".json": _read_json, ".jsonl": _read_json_lines, ".csv": _read_csv, ".parquet": _read_parquet}
    if (suffix := file.suffix.lower()) not in readers:
        raise ValueError(f"{file} ends with {suffix!r}: convert it to one of {', '.join(readers)}.")
    try:
        yield from readers[suffix](file)
    # Of a broken Parquet file pyarrow raises errors of several kinds, OSError among them.
    except (BadRowError, UnicodeDecodeError, csv.Error, pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is no valid {suffix} file: {error}. Mend or convert it.") from error


def _as_record(value: Any) -> dict | BadRowError:
    return value if isinstance(value, dict) else BadRowError("not a JSON object", reprlib.repr(value))


def _read_json(file: Path) -> NumberedRecords:
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    if content.lstrip().startswith(b"["):
        return ((number, _as_record(value)) for number, value in enumerate(parsed_json(content), start=1))
    return _read_json_lines(file)


def _read_json_lines(file: Path) -> NumberedRecords:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, _as_record(parsed_json(line))
            except BadRowError as error:
                yield number, error


def _read_csv(file: Path) -> NumberedRecords:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, record in enumerate(csv.DictReader(lines), start=1):
            if surplus := record.get(None):
                yield number, BadRowError("more cells than the header", f"{surplus}: quote cells that have commas")
            else:
                yield number, record


def _read_parquet(file: Path) -> NumberedRecords:
    with pyarrow.parquet.ParquetFile(file) as table:
        yield from enumerate(
            (row for batch in table.iter_batches(ROWS_PER_READ) for row in batch.to_pylist()), start=1
        )
