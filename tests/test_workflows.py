"""The CI workflows use the documented commands and the supported versions."""

import tomllib
from importlib.metadata import requires

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from places import ROOT


WORKFLOWS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github/workflows").glob("*.yml")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LOWEST_PYTHON = PROJECT["requires-python"].removeprefix(">=")


def steps_of(workflow: str) -> list[dict]:
    return [step for job in WORKFLOWS[workflow]["jobs"].values() for step in job["steps"]]


def lowest(specifier: SpecifierSet) -> Version:
    return next(Version(part.version) for part in specifier if part.operator == ">=")


def test_the_default_tests_run_on_every_python_from_the_lowest():
    versions = WORKFLOWS["tests"]["jobs"]["default"]["strategy"]["matrix"]["python-version"]
    assert versions == [f"3.{minor}" for minor in range(Version(LOWEST_PYTHON).minor, 14)]
    elsewhere = {step["with"]["python-version"] for name in WORKFLOWS for step in steps_of(name) if "with" in step}
    assert elsewhere == {LOWEST_PYTHON, "${{ matrix.python-version }}"}


def test_no_lower_bound_is_below_one_of_transformers():
    """Such a version could never be installed."""
    ours = {requirement.name: requirement.specifier for requirement in map(Requirement, PROJECT["dependencies"])}
    for requirement in map(Requirement, requires("transformers")):
        name = requirement.name.replace("-", "_")
        if requirement.marker is None and name in ours:
            assert lowest(ours[name]) >= lowest(requirement.specifier), name
