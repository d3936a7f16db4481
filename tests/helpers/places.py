"""Paths of the repository."""

from pathlib import Path


HELPERS = Path(__file__).resolve().parent
ROOT = HELPERS.parent.parent
EXAMPLES = ROOT / "examples"
