"""Supported releases of Transformers: the range, errors of others, and the model tests with the lowest release."""

import os
import re
import subprocess
import tomllib

import pytest
import transformers
import yaml
from clean_environment import make_environment
from packaging.requirements import Requirement
from packaging.version import Version
from places import ROOT

from modeling_trips.configuration_trips import TRANSFORMERS


RANGE = Requirement(TRANSFORMERS).specifier
LOWEST = min(Version(bound.version) for bound in RANGE)
LOAD = """
import sys, transformers
try:
    getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    print(error)
"""
RUN_TESTS = """
import sys
import pytest
status = pytest.main(sys.argv[1:])
import transformers
print("ran with transformers", transformers.__version__)
sys.exit(status)
"""


def test_package_and_documents_name_one_range():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    assert TRANSFORMERS in dependencies and TRANSFORMERS in (ROOT / "docs/use.md").read_text("utf-8")
    assert Version(transformers.__version__) in RANGE
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text("utf-8"))["jobs"]
    assert f"{LOWEST}.0" in jobs["transformers"]["strategy"]["matrix"]["release"]


@pytest.mark.slow
@pytest.mark.parametrize("auto_class", ["AutoConfig", "AutoProcessor", "AutoModelForVisualQuestionAnswering"])
def test_an_unsupported_release_is_named_before_anything_fails(checkpoints, tmp_path, auto_class):
    python = make_environment(ROOT / "build" / "transformers-4.57.6", ["transformers==4.57.6"])
    environment = {**os.environ, "HF_HOME": str(tmp_path)}  # a fresh cache of remote code
    command = [python, "-I", "-c", LOAD, checkpoints["TripsForQuestionAnswering"], auto_class]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert "4.57.6" in printed and TRANSFORMERS in printed


@pytest.mark.slow
def test_the_tests_of_the_models_pass_with_the_lowest_release(tmp_path):
    python = make_environment(
        ROOT / "build" / f"transformers-{LOWEST}-tests", [f"transformers=={LOWEST}.0"], exclude_project=False
    )
    options = ["-m", "not slow", "-q", "-p", "no:cacheprovider", "-n", "2", f"--basetemp={tmp_path / 'tests'}"]
    command = [python, "-I", "-c", RUN_TESTS, *options, "tests/models"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2000:]
    assert re.search(r"ran with transformers (\S+)", result.stdout)[1] == f"{LOWEST}.0"
