"""Atomic writing of files."""

import json
from collections.abc import Iterable
from pathlib import Path

from modeling_trips.inspection.files import whole_file


def write_whole(path: str | Path, content: str | bytes):
    """Write a file atomically, and make its folder."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: str | Path, value):
    """Write indented JSON atomically."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: str | Path, rows: Iterable[dict]):
    """Write JSON lines atomically."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
