"""Supported releases of Transformers: errors of others, and the model tests with the lowest release."""

import json
import logging
import os
import re
import subprocess
import tomllib

import pytest
import transformers
import yaml
from clean_environment import make_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from places import ROOT

from modeling_trips.configuration_trips import BEYOND, LOWEST, NEWEST_TESTED, check_release


RANGE = SpecifierSet(f">={LOWEST},<{BEYOND}")
LOAD = """
import json, sys, transformers
failures = {}
for name in ("AutoConfig", "AutoProcessor", "AutoModelForVisualQuestionAnswering"):
    try:
        getattr(transformers, name).from_pretrained(sys.argv[1], trust_remote_code=True)
    except Exception as error:
        failures[name] = [type(error).__name__, str(error)]
print(json.dumps(failures))
"""
RUN_TESTS = """
import sys
import pytest
status = pytest.main(sys.argv[1:])
import transformers
print("ran with transformers", transformers.__version__)
sys.exit(status)
"""


def test_package_code_documents_and_workflow_name_one_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    requirements = {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}
    assert requirements["transformers"].specifier == RANGE
    assert Version(LOWEST) <= Version(NEWEST_TESTED) < Version(BEYOND)
    assert transformers.__version__ in RANGE
    texts = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "docs/use.md")}
    named = {name: re.findall(r"transformers(>=[\d.]+,<[\d.]+)", text) for name, text in texts.items()}
    assert named["docs/use.md"] and f"{LOWEST} to {NEWEST_TESTED}" in texts["docs/use.md"]
    assert {SpecifierSet(found) for found in sum(named.values(), [])} == {RANGE}
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text("utf-8"))["jobs"]
    assert jobs["transformers"]["strategy"]["matrix"]["release"] == [f"{LOWEST}.0", f"{NEWEST_TESTED}.*"]


@pytest.mark.parametrize("release", ["4.57.6", "5.19.0", f"{BEYOND}.0.0"])
def test_other_releases_are_refused(release):
    with pytest.raises(ImportError) as caught:
        check_release(release)
    assert release in str(caught.value) and f"transformers>={LOWEST},<{BEYOND}" in str(caught.value)


@pytest.mark.parametrize(
    "release, is_tested",
    [(f"{LOWEST}.0", True), (f"{NEWEST_TESTED}.9", True), ("5.99.0", False), ("5.99.0.dev0", False)],
)
def test_releases_newer_than_the_tested_ones_are_warned_of(release, is_tested, caplog):
    with caplog.at_level(logging.WARNING):
        check_release(release)
    assert [record.levelname for record in caplog.records] == ([] if is_tested else ["WARNING"])


@pytest.mark.slow
def test_an_unsupported_release_is_named_before_anything_fails(checkpoints, tmp_path):
    python = make_environment(ROOT / "build" / "transformers-4.57.6", ["transformers==4.57.6"])
    environment = {**os.environ, "HF_HOME": str(tmp_path)}  # a fresh cache of remote code
    command = [python, "-I", "-c", LOAD, checkpoints["TripsForQuestionAnswering"]]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    failures = json.loads(result.stdout.splitlines()[-1])
    assert set(failures) == {"AutoConfig", "AutoProcessor", "AutoModelForVisualQuestionAnswering"}
    for kind, message in failures.values():
        assert kind == "ImportError" and f"transformers>={LOWEST},<{BEYOND}" in message


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
