"""Where things are, for tests of any room."""

from pathlib import Path


TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
EXAMPLES = ROOT / "examples"
