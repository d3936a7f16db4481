"""The project works with the lowest and with the newest release of Transformers that it promises."""

import re
import subprocess

import pytest
import transformers
from clean_environment import make_environment
from packaging.version import Version
from places import ROOT


LOWEST, BEYOND = re.search(
    r'"transformers>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8")
).groups()
NEWEST = "5.24.0"  # of the releases that were tried
RUN_TESTS = """
import sys
import pytest
status = pytest.main(sys.argv[1:])
import transformers
print("ran with transformers", transformers.__version__)
sys.exit(status)
"""


def test_the_range_is_that_of_the_releases_that_were_tried_and_the_readme_tells_them():
    assert Version(LOWEST) <= Version(NEWEST) < Version(BEYOND)
    assert Version(LOWEST) <= Version(transformers.__version__) < Version(BEYOND)
    releases = set(re.findall(r"\b5\.\d+\.\d+\b", (ROOT / "README.md").read_text("utf-8")))
    assert set(map(Version, releases)) == {Version(LOWEST), Version(NEWEST)}


@pytest.mark.slow
@pytest.mark.parametrize("version", sorted({Version(LOWEST), Version(NEWEST)}), ids=str)
def test_the_default_tests_pass_with_the_release(version, tmp_path):
    if version == Version(transformers.__version__):
        pytest.skip(f"Transformers {version} is what is installed: the default tests themselves run with it")
    python = make_environment(
        ROOT / "build" / f"transformers-{version}", [f"transformers=={version}"], exclude_project=False
    )
    command = [python, "-I", "-c", RUN_TESTS, "-m", "not slow", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run([*command, f"--basetemp={tmp_path / 'tests'}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2000:]
    assert Version(re.search(r"ran with transformers (\S+)", result.stdout)[1]) == version
