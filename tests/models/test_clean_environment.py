"""Saved checkpoints give bit-identical results without this project."""

import json
import sys

import pytest
import torch
from json_files import read_json
from PIL import Image
from places import ROOT
from programs import output_of
from torch.utils._pytree import keystr, tree_flatten_with_path

from modeling_trips.registration_trips import MODELS


pytestmark = pytest.mark.slow
STRANGER = ROOT / "tests/helpers/stranger.py"
WITH_PROJECT = "import runpy, sys, modeling_trips; runpy.run_path(sys.argv.pop(1), run_name='__main__')"


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "picture.png"
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (48, 80, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def run_stranger(python, checkpoints, image, folder, **environment):
    folder.mkdir()
    auto_classes = {}
    for head, path in checkpoints.items():
        auto_map = read_json(path / "config.json")["auto_map"]
        auto_classes[head] = [name for name in auto_map if name in MODELS]
    source = next(iter(checkpoints.values())).parent
    variables = {"HF_HOME": str(folder / "home"), **environment}  # a fresh cache of remote code
    command = [*python, STRANGER, source, image, folder]
    output_of(*command, input=json.dumps(auto_classes), variables=variables, cwd=folder)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def expected(checkpoints, image, tmp_path_factory):
    """Return the results of an environment with this project."""
    folder = tmp_path_factory.mktemp("project") / "results"
    python = [sys.executable, "-c", WITH_PROJECT]
    results = run_stranger(python, checkpoints, image, folder, PYTHONPATH=str(ROOT))
    assert results.pop("project")
    return results


def assert_identical(actual, expected):
    """Compare nested results, whose tensors must be bit-identical."""
    found, structure = tree_flatten_with_path(actual)
    leaves, expected_structure = tree_flatten_with_path(expected)
    assert structure == expected_structure
    for (where, value), (_, expected_value) in zip(found, leaves):
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, expected_value, rtol=0, atol=0, msg=keystr(where))
        else:
            assert value == expected_value, keystr(where)


def assert_same_repository(again, folder):
    """Check that a checkpoint that is loaded and saved again has all files of the original."""
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        if path.name not in ("config.json", "tokenizer_config.json"):  # loading adds fields to these files
            assert (again / path.name).read_bytes() == path.read_bytes(), path
    config = read_json(folder / "config.json")
    config_again = read_json(again / "config.json")
    for name in ("architectures", "auto_map", "custom_pipelines"):
        assert config_again.get(name) == config.get(name), folder


def test_a_folder_serves_strangers(checkpoints, image, expected, clean_python, tmp_path):
    results = run_stranger([clean_python, "-I"], checkpoints, image, tmp_path / "results")
    assert not results.pop("project")
    assert_identical(results, expected)
    for head, folder in checkpoints.items():
        assert_same_repository(tmp_path / "results" / head, folder)
