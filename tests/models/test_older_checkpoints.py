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
from tiny_retrieval import captions, images, make_model

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


# ---------------------------------------------------------------------------------------------------------------------
# Fields that are no more


def write_with_fields(folder: Path, **fields) -> modeling_trips.TripsForRetrieval:
    """Writes a model for retrieval whose config.json has these fields, too, and returns it."""
    model = make_model()
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert fields.keys().isdisjoint(config)
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"honest_negatives": True, "honest_masking": False, "contrastive_selection": "image"},
        {"honest_negatives": False, "honest_masking": True, "contrastive_selection": "text"},
    ],
    ids=str,
)
def test_what_changed_nothing_but_training_loads_in_silence_and_is_forgotten(fields, tmp_path, recwarn):
    model = write_with_fields(tmp_path, **fields)
    loaded = modeling_trips.TripsForRetrieval.from_pretrained(tmp_path)
    inputs = {name: value for name, value in captions().items() if name != "image_index"}
    output, expected = loaded(**inputs), model(**inputs)
    assert torch.equal(output.logits_per_image, expected.logits_per_image)
    matched, expected = (each.match(**captions()) for each in (loaded, model))
    assert torch.equal(matched.itm_logits, expected.itm_logits)
    loaded.save_pretrained(tmp_path / "again")
    assert fields.keys().isdisjoint(json.loads((tmp_path / "again" / "config.json").read_text()))
    assert not recwarn.list


@torch.no_grad()
def test_features_of_all_patches_are_refused_where_there_are_features(tmp_path):
    model = write_with_fields(tmp_path, contrastive_selection="none")
    for head in (modeling_trips.TripsForRetrieval, modeling_trips.TripsForPreTraining):
        with pytest.raises(ValueError, match=r"is an option no more\. Load with `contrastive_selection='image'`"):
            head.from_pretrained(tmp_path)
    assert modeling_trips.TripsModel.from_pretrained(tmp_path).config.contrastive_selection == "none"
    load = modeling_trips.TripsForRetrieval.from_pretrained
    by_image = load(tmp_path, contrastive_selection="image").get_image_features(images()).pooler_output
    assert torch.equal(by_image, model.get_image_features(images()).pooler_output)
    of_all = load(tmp_path, contrastive_selection="image", keep_rate=1.0).get_image_features(images())
    unpruned = model.model.vision_model(images(), select_patches=False)
    assert torch.equal(of_all.last_hidden_state, unpruned.last_hidden_state)
