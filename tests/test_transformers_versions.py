"""The project works with the lowest and with the newest release of Transformers that it promises."""

import re
import subprocess
from pathlib import Path

import pytest
import transformers
from clean_environment import make_environment


ROOT = Path(__file__).resolve().parent.parent
LOWEST = re.search(r'"transformers>=([\d.]+),', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
NEWEST = "5.24.0"  # of the releases that were tried
RUN_TESTS = """
import sys
import pytest
status = pytest.main(sys.argv[1:])
import transformers
print("ran with transformers", transformers.__version__)
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", [LOWEST, NEWEST])
def test_the_default_tests_pass_with_the_release(version):
    version = re.sub(r"^(\d+\.\d+)$", r"\1.0", version)
    if version == transformers.__version__:
        pytest.skip(f"Transformers {version} is what is installed: the default tests themselves run with it")
    python = make_environment(
        ROOT / "build" / f"transformers-{version}", [f"transformers=={version}"], exclude_project=False
    )
    command = [python, "-I", "-c", RUN_TESTS, "-m", "not slow", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2000:]
    assert f"ran with transformers {version}\n" in result.stdout
