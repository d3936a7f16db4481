"""
Numbered records of JSON, JSONL, CSV and Parquet files.

`datasets.load_dataset` stops at the first line that is not valid JSON, gives each column one type, and converts CSV
cells such as `none` and `01` to other values. These readers name a bad line, can skip it, and keep texts unchanged.
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

ROWS_PER_READ = 256  # Parquet rows may hold images


def existing_file(path: Path) -> Path:
    """Return the path of a file. Raise a `FileNotFoundError` if it does not exist."""
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder. Give a file.")
    if not path.is_file():
        raise FileNotFoundError(f"The file {path} does not exist.")
    return path


def parsed_json(text: str | bytes) -> Any:
    """
    Parse JSON.

    Raises:
        `BadRowError`: The text is not valid JSON, not UTF-8, nested too deeply, or has a number that is too long.
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
    except ValueError as error:  # an integer with thousands of digits
        raise BadRowError("broken JSON", str(error).partition(";")[0]) from error


def read_records(file: Path) -> NumberedRecords:
    """
    Yield the records of a file with their numbers from 1: lines of JSONL, items of a JSON list, records of CSV
    (without the header) and of Parquet. The record of an invalid line is its error.

    Raises:
        `FileNotFoundError`: The file does not exist.
        `ValueError`: The file as a whole cannot be read.
    """
    existing_file(file)
    readers = {".json": _read_json, ".jsonl": _read_json_lines, ".csv": _read_csv, ".parquet": _read_parquet}
    if (suffix := file.suffix.lower()) not in readers:
        raise ValueError(f"{file} ends with {suffix!r}. Convert it to one of {', '.join(readers)}.")
    try:
        yield from readers[suffix](file)
    # For a broken Parquet file pyarrow raises several types of errors, including OSError.
    except (BadRowError, UnicodeDecodeError, csv.Error, pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a valid {suffix} file: {error}. Repair or convert it.") from error


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
