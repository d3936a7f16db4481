"""Records of files: JSON, JSONL, CSV and Parquet.

`datasets.load_dataset` is used for tables that hold images. It would shift the columns of a CSV file with unquoted
commas, convert cells such as `none` and `01`, and reject a whole file for one invalid line, so texts are read here.
"""

import codecs
import csv
import json
import logging
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from modeling_trips.image_decoding_trips import FORMATS
from trips_examples.data.tasks import BadRowError


logger = logging.getLogger(__name__)

# A record, or the JSON text of one, with its number from 1: lines of JSONL, items of a list, records of a table.
NumberedRecords = Iterator[tuple[int, dict | str]]

IMAGE_SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
WORKBOOKS = (".xlsx", ".xlsm", ".xls", ".ods")
SEPARATORS = (",", ";", "\t")  # the first is taken if they are level
# A line of a CSV file with a cell that names an image.
_LINE_WITH_IMAGE = re.compile(rf".*\.({'|'.join(IMAGE_SUFFIXES)}) *\"?([,;\t]|$)", re.IGNORECASE)


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
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"the key or column {repeated[0]!r} occurs twice")


def read_records(file: Path) -> NumberedRecords:
    """Yield the records of a JSON, JSONL, CSV or Parquet file. Raise a `ValueError` if it cannot be read."""
    readers = {".json": _read_json, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
    readers |= dict.fromkeys((".csv", ".tsv", ".txt"), _read_csv)
    suffix = file.suffix.lower()
    if suffix not in readers:
        how = f"Convert it to {', '.join(readers)}"
        if suffix in WORKBOOKS:
            how = "Save it as CSV, in Excel as CSV UTF-8"
        raise ValueError(f"{file} ends with {suffix!r}. {how}.")
    try:
        yield from readers[suffix](file)
    # pyarrow raises several types of errors, including OSError.
    except (ValueError, RecursionError, csv.Error, pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a valid {suffix} file: {error}. Repair or convert it.") from error


def _read_json(file: Path) -> NumberedRecords:
    content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not content.lstrip().startswith(b"["):
        yield from _read_json_lines(file)
        return
    for number, value in enumerate(json.loads(content, object_pairs_hook=_unique_keys), start=1):
        yield number, json.dumps(value)


def _read_json_lines(file: Path) -> NumberedRecords:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line


def _read_csv(file: Path) -> NumberedRecords:
    number = 0
    with file.open(encoding=_encoding_of(file), newline="") as lines:
        header = lines.readline()
        lines.seek(0)
        # The separator that makes the most cells of the header: a comma, or what Excel writes.
        separator = max(SEPARATORS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), ())))
        table = csv.DictReader(lines, strict=True, delimiter=separator)
        try:
            _refuse_repeated(table.fieldnames or ())
            for number, record in enumerate(table, start=1):
                if None in record:
                    raise ValueError(
                        f"row {number} has more cells than the header; quote cells that have {separator!r}"
                    )
                swallowed = _swallowed_line(record, separator)
                if swallowed is not None:
                    raise ValueError(f"a cell of row {number} holds a whole row, {swallowed!r}; correct its quotes")
                yield number, record
        except csv.Error as error:
            raise ValueError(f"row {number + 1}: {error}; correct its quotes") from error


def _encoding_of(file: Path) -> str:
    """Return the encoding of a table of texts: UTF-8, or that of Excel."""
    with file.open("rb") as start:
        if start.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for _ in lines:
                pass
    except UnicodeDecodeError:
        logger.warning(f"{file} is not in UTF-8 and is read as cp1252, the encoding of Windows.")
        return "cp1252"
    return "utf-8-sig"


def _swallowed_line(record: dict[str, str | None], separator: str) -> str | None:
    """Return a line of a record of CSV that is a row of its own, which stray quotes made part of a cell, or None."""
    for cell in record.values():
        for line in (cell or "").splitlines()[1:]:
            if separator in line and _LINE_WITH_IMAGE.match(line):
                return line
    return None


def _read_parquet(file: Path) -> NumberedRecords:
    number = 0
    with pyarrow.parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(256):  # rows may hold images
            for row in batch.to_pylist():
                number += 1
                yield number, row
