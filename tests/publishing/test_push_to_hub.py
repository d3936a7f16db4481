"""Publishing with `examples/push_to_hub.py`: published files, refused files, and the upload to a local Hub."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from foreign_code import name_foreign_code
from huggingface_hub import HfApi, snapshot_download
from json_files import read_json
from loopback_hub import LoopbackHub
from PIL import Image
from places import ROOT
from programs import output_of
from random_checkpoint import save_random_checkpoint
from safetensors.torch import load_file, save_file

import modeling_trips
from modeling_trips import TripsConfig, TripsForQuestionAnswering, TripsProcessor, TripsVisionModel
from modeling_trips.publishing.repository import check_code
from trips_examples import push_to_hub


REPO = "ada/trips-test"
LEFTOVERS = {"eval_results.json", "training_args.bin", "optimizer.pt", "predictions.jsonl", "other.py", ".env"}


HANDLER_CALL = """
import base64, io, sys
from huggingface_hub import snapshot_download

sys.path.insert(0, folder := snapshot_download(repository))
from handler import EndpointHandler

image.save(file := io.BytesIO(), "PNG")
inputs = {"image": base64.b64encode(file.getvalue()).decode(), "question": "what is it?", "texts": ["it", "color"]}
print(EndpointHandler(folder)({"inputs": inputs}))
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        hub.connect(monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture
def checkpoint(tmp_path):
    """Write the files of a training: model, processor, results, and private files."""
    folder = tmp_path / "checkpoint"
    save_random_checkpoint(folder, TripsForQuestionAnswering, ["what color is it?", "red blue yes no"])
    for name in LEFTOVERS:
        (folder / name).write_text('{"eval_accuracy": 0.9971}')
    return folder


def published(folder):
    return {path.name for path in folder.iterdir()} - LEFTOVERS | {"README.md"}


def push(folder, *options):
    return push_to_hub.main(["--model", str(folder), "--repo_id", REPO, *options])


def dry_run(folder, target, *options):
    push(folder, "--dry_run", "--output_dir", str(target), *options)
    return target


def test_all_files_arrive_in_one_commit(hub, checkpoint):
    address = push(checkpoint, "--datasets", "easy-VQA")
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 2
    assert address.endswith(repository.sha)
    assert not repository.private
    assert repository.files.keys() == published(checkpoint)
    weights = load_file(Path(snapshot_download(REPO)) / "model.safetensors")
    torch.testing.assert_close(weights, load_file(checkpoint / "model.safetensors"), rtol=0, atol=0)


def test_dry_run_lists_files_without_upload(hub, checkpoint, tmp_path, capsys):
    target = dry_run(checkpoint, tmp_path / "new" / "folder")
    printed = capsys.readouterr().out
    assert hub.requests == []
    listed = {name: size for size, name in re.findall(r"^ *([\d,]+)  (\S+\.\S+)$", printed, re.MULTILINE)}
    assert listed.keys() == {path.name for path in target.iterdir()} == published(checkpoint)
    assert listed["model.safetensors"] == f"{(target / 'model.safetensors').stat().st_size:,}"
    with pytest.raises(OSError):
        dry_run(checkpoint, target)


def test_the_tokenizer_s_files_are_those_of_the_model_alone(checkpoint, tmp_path):
    processor = TripsProcessor.from_pretrained(checkpoint)
    processor(images=Image.new("RGB", (64, 64)), text="what color is it?", return_tensors="pt")
    processor.tokenizer.save_pretrained(checkpoint)  # with the padding of this batch
    target = dry_run(checkpoint, tmp_path / "target")
    assert read_json(target / "tokenizer.json")["padding"] is None
    assert not {"is_local", "local_files_only"} & read_json(target / "tokenizer_config.json").keys()


def test_private_does_not_publish_into_a_public_repository(hub, checkpoint):
    push(checkpoint, "--private")
    assert HfApi().model_info(REPO).private
    HfApi().create_repo("ada/public")
    with pytest.raises(ValueError, match="--private"):
        push_to_hub.main(["--model", str(checkpoint), "--repo_id", "ada/public", "--private"])
    assert not hub.repositories["ada/public"].files


def test_new_version_keeps_files_of_the_owner(hub, checkpoint):
    HfApi().create_repo(REPO)
    for name in ("model-00001-of-00002.safetensors", "old_code.py", "docs/a.png"):
        HfApi().upload_file(path_or_fileobj=b"old", path_in_repo=name, repo_id=REPO)
    push(checkpoint)
    assert hub.repositories[REPO].files.keys() == published(checkpoint) | {"docs/a.png"}


def make_headless(folder):
    config = TripsConfig.from_pretrained(folder)
    TripsVisionModel(config.vision_config).save_pretrained(folder)


def change_weights(folder, value):
    """Give a weight another value, or leave it out."""
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.dense.bias"]
    if value is not None:
        weights["lm_head.dense.bias"] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "spoil, named",
    [
        (make_headless, "TripsVisionModel"),
        (lambda folder: change_weights(folder, None), "lm_head.dense.bias"),
        (lambda folder: change_weights(folder, torch.full([128], torch.nan)), "lm_head.dense.bias"),
        (lambda folder: (folder / "export.json").write_text("{}"), "exported"),
        (name_foreign_code, "foreign"),
    ],
)
def test_unsuitable_folders_raise(spoil, named, checkpoint, tmp_path):
    spoil(checkpoint)
    with pytest.raises(ValueError, match=named):
        dry_run(checkpoint, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "name, fields",
    [
        ("config.json", {"vision_config": {"auto_map": {"AutoModel": "mallory/foreign--modeling.Model"}}}),
        ("config.json", {"custom_pipelines": {"text-generation": {"impl": "mallory/foreign--pipeline.Pipeline"}}}),
        ("generation_config.json", {"custom_generate": "mallory/foreign"}),
    ],
)
def test_reference_to_foreign_code_raises(checkpoint, name, fields):
    check_code(checkpoint)
    (checkpoint / name).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=name):
        check_code(checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["TripsForQuestionAnswering", "TripsForRetrieval"])
def test_card_and_handler_run_without_the_project(head, hub, tmp_path, clean_python):
    folder = save_random_checkpoint(tmp_path / "checkpoint", getattr(modeling_trips, head), ["what color is it?"])
    push(folder, "--with_handler")
    (code,) = re.findall(r"```python\n(.*?)```", hub.repositories[REPO].files["README.md"].decode(), re.DOTALL)
    code += HANDLER_CALL
    reader = hub.client_environment(tmp_path / "reader")
    there = output_of(clean_python, "-I", "-c", code, variables=reader, cwd=tmp_path)
    author = hub.client_environment(tmp_path / "author")
    here = output_of(sys.executable, "-c", f"import modeling_trips\n{code}", variables=author, cwd=ROOT)
    assert there == here and there.count("\n") >= 3  # scores and boxes to the last digit
