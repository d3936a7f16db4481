"""Supported releases of Transformers: the range, errors of others, and a few tests with the lowest release."""

import os
import re
import subprocess
import tomllib

import pytest
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
# Load, train, generate, patch another model.
SMOKE_TESTS = [
    "tests/models/test_shipped_checkpoint.py",
    "tests/models/test_selection_gate.py",
    "tests/models/test_modeling_trips_generation.py",
    "tests/hosts/test_vision.py",
]
RUN_TESTS = """
import sys
import pytest
status = pytest.main(sys.argv[1:])
import transformers
print("ran with transformers", transformers.__version__)
sys.exit(status)
"""


def test_the_package_needs_the_same_range():
    assert TRANSFORMERS in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]


@pytest.mark.slow
def test_an_unsupported_release_is_named_before_anything_fails(checkpoints, tmp_path):
    python = make_environment(ROOT / "build" / "transformers-4.57.6", ["transformers==4.57.6"])
    environment = {**os.environ, "HF_HOME": str(tmp_path)}  # a fresh cache of remote code
    command = [
        python,
        "-I",
        "-c",
        LOAD,
        checkpoints["TripsForQuestionAnswering"],
        "AutoModelForVisualQuestionAnswering",
    ]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert "4.57.6" in printed and TRANSFORMERS in printed


@pytest.mark.slow
def test_a_few_tests_pass_with_the_lowest_release(tmp_path):
    python = make_environment(
        ROOT / "build" / f"transformers-{LOWEST}-tests", [f"transformers=={LOWEST}.0"], exclude_project=False
    )
    options = ["-m", "not slow", "-q", "-p", "no:cacheprovider", "-n", "2", f"--basetemp={tmp_path / 'tests'}"]
    command = [python, "-I", "-c", RUN_TESTS, *options, *SMOKE_TESTS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2000:]
    assert re.search(r"ran with transformers (\S+)", result.stdout)[1] == f"{LOWEST}.0"
