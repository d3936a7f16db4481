"""Files in, as numbered records: JSON, JSONL, CSV, Parquet."""

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
