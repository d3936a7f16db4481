"""JSON files."""

import json
from pathlib import Path


def read_json(path: Path):
    return json.loads(path.read_text("utf-8"))
