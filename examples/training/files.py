"""Atomic writing of files."""

import json
import os
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes):
    """Write a file atomically through a temporary file, and make its folder."""
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(partial, path)


def write_json(path: str | Path, value):
    """Write indented JSON atomically."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: str | Path, rows: Iterable[dict]):
    """Write JSON lines atomically."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
