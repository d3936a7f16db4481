"""A checkpoint of version 0.1.0 answers as it did then: with its own code, with today's, and published anew."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from clean_environment import make_environment
from places import TESTS
from stranger import TEXTS, use_checkpoint

import modeling_trips


HEAD, AUTO_CLASS = "TripsForQuestionAnswering", "AutoModelForVisualQuestionAnswering"
FILE = "registration_trips.py"  # of those that every checkpoint carries
STRANGER = """
import runpy, sys, torch
script, source, image, head, auto_class, folder = sys.argv[1:]
results = runpy.run_path(script)["use_checkpoint"](source, image, head, [auto_class], folder)
torch.save({**results, "project": "modeling_trips" in sys.modules}, f"{folder}/results.pt")
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Weights, their own code, a picture, and what that code made of the picture and `TEXTS`."""
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(TESTS / "data" / "checkpoint_0.1.0.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def saved_again(checkpoint, tmp_path_factory) -> tuple[Path, dict]:
    """The checkpoint saved by today's classes, and what they made of the picture and the texts before."""
    folder = tmp_path_factory.mktemp("again")
    return folder, use_checkpoint(str(checkpoint), str(checkpoint / "picture.png"), HEAD, [AUTO_CLASS], str(folder))


def use_elsewhere(checkpoint: Path, picture: Path, folder: Path) -> dict:
    """What a process makes of the picture and the texts that has the checkpoint's own code alone."""
    (folder / "saved").mkdir()
    python = make_environment(folder / "clean")
    command = [python, "-I", "-c", STRANGER, TESTS / "stranger.py", checkpoint, picture, HEAD, AUTO_CLASS]
    environment = {**os.environ, "HF_HOME": str(folder / "home")}  # a fresh cache of remote code
    result = subprocess.run([*command, folder / "saved"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    results = torch.load(folder / "saved" / "results.pt", weights_only=True)
    assert not results.pop("project")
    return results


def assert_as_then(results: dict, checkpoint: Path):
    expected = json.loads((checkpoint / "expected.json").read_text())
    assert expected["texts"] == TEXTS
    actual = results[AUTO_CLASS]
    assert actual["class"] == HEAD
    assert [layer.tolist() for layer in actual["kept"]] == expected["kept"]
    assert actual["generated"].tolist() == expected["generated"]
    torch.testing.assert_close(actual["states"], torch.tensor(expected["states"]), rtol=0, atol=1e-5)


def test_today_s_classes_answer_as_the_older_ones_did(checkpoint, saved_again):
    folder, results = saved_again
    assert_as_then(results, checkpoint)
    code = Path(modeling_trips.__file__).with_name(FILE).read_bytes()
    assert (folder / FILE).read_bytes() == code != (checkpoint / FILE).read_bytes()


@pytest.mark.slow
def test_its_own_code_still_answers_where_the_project_is_not_installed(checkpoint, tmp_path):
    assert_as_then(use_elsewhere(checkpoint, checkpoint / "picture.png", tmp_path), checkpoint)


@pytest.mark.slow
def test_saved_again_it_answers_where_the_project_is_not_installed(checkpoint, saved_again, tmp_path):
    assert_as_then(use_elsewhere(saved_again[0], checkpoint / "picture.png", tmp_path), checkpoint)
