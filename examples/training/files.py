"""Files that are either whole or not there."""

import json
import os
from collections.abc import Iterable
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes):
    """Writes a file under another name first, so that no part of it ever stands under its own; makes its folder."""
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(partial, path)


def write_json(path: str | Path, value):
    """Writes JSON with two spaces per level, as `write_whole` does."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def write_json_lines(path: str | Path, rows: Iterable[dict]):
    """Writes a JSON object per row, one per line, as `write_whole` does."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
