"""Paths of the repository."""

from pathlib import Path


TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"
