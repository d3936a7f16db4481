"""Publishing to a local Hub with `examples/push_to_hub.py` and with `push_to_hub` of model and processor."""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from foreign_code import name_foreign_code
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from loopback_hub import LoopbackHub
from random_checkpoint import save_random_checkpoint
from safetensors.torch import load_file, save_file

from modeling_trips import (
    TripsConfig,
    TripsForQuestionAnswering,
    TripsForRetrieval,
    TripsModel,
    TripsProcessor,
    TripsVisionModel,
)
from modeling_trips.publishing.repository import check_code
from trips_examples import push_to_hub


REPO = "ada/trips-test"
LEFTOVERS = {"eval_results.json", "training_args.bin", "optimizer.pt", "predictions.jsonl", "other.py", ".env"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub(users={"hf_ada": "ada", "hf_bob": "bob"}) as hub:
        hub.connect(monkeypatch, tmp_path / "home", token="hf_ada")
        yield hub


def make_checkpoint(folder: Path, model_class=TripsForQuestionAnswering) -> Path:
    """Write the files of a training: model, processor, results, and private files."""
    save_random_checkpoint(folder, model_class, ["what color is it?", "red blue yes no"])
    for name in LEFTOVERS:
        (folder / name).write_text('{"eval_accuracy": 0.9971}')
    return folder


def published(folder: Path) -> set[str]:
    """Return the expected files of the repository: the saved files, a card, and the Hub's initial file."""
    return {path.name for path in folder.iterdir()} - LEFTOVERS | {"README.md", ".gitattributes"}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


def push(folder: Path, *options: str) -> str | None:
    return push_to_hub.main(["--model", str(folder), "--repo_id", REPO, *options])


def test_all_files_arrive_in_one_commit(hub, checkpoint):
    options = ["--datasets", "easy-VQA", "--tag", "v1.0", "--commit_message", "First version"]
    address = push(checkpoint, *options)
    repository = hub.repositories[REPO]
    assert list(repository.titles.values()) == ["initial commit", "First version"]
    sha = repository.branches["main"]
    assert address == f"{hub.url}/{REPO}/commit/{sha}" and repository.tags == {"v1.0": sha}
    assert repository.commits[sha].keys() == published(checkpoint)
    sent, kept = huggingface_hub.snapshot_download(REPO), load_file(checkpoint / "model.safetensors")
    weights = load_file(Path(sent) / "model.safetensors")
    assert weights.keys() == kept.keys() and all(weights[name].equal(kept[name]) for name in kept)
    info = HfApi().model_info(REPO)
    assert not info.private and info.pipeline_tag == "visual-question-answering"
    assert info.card_data.eval_results[0].metric_value == 0.9971


def test_dry_run_lists_files_without_upload(hub, checkpoint, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert push(checkpoint, "--dry_run", "--license", "mit") is None
    printed = capsys.readouterr().out
    assert hub.requests == []
    listed = {name: size for size, name in re.findall(r"^ *([\d,]+)  (\S+\.\S+)$", printed, re.MULTILINE)}
    assert listed.keys() == published(checkpoint) - {".gitattributes"}
    assert listed["model.safetensors"] == f"{(checkpoint / 'model.safetensors').stat().st_size:,}"
    assert "\nlicense: mit\n" in printed and "\n## Limits\n" in printed


def test_a_private_repository_is_private_from_the_start(hub, checkpoint):
    push(checkpoint, "--private")
    assert HfApi().model_info(REPO).private
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info(REPO, token="hf_bob")


def test_private_does_not_publish_into_a_public_repository(hub, checkpoint):
    HfApi().create_repo(REPO)
    with pytest.raises(ValueError, match="--private"):
        push(checkpoint, "--private")
    assert len(hub.repositories[REPO].commits) == 1


def test_commit_to_a_branch_leaves_main_unchanged(hub, checkpoint):
    HfApi().create_repo(REPO)
    with pytest.raises(RevisionNotFoundError):
        push(checkpoint, "--revision", "next")
    HfApi().create_branch(REPO, branch="next")
    push(checkpoint, "--revision", "next")
    assert HfApi().list_repo_files(REPO) == [".gitattributes"]
    assert set(HfApi().list_repo_files(REPO, revision="next")) == published(checkpoint)


def test_existing_tag_raises(hub, checkpoint):
    push(checkpoint, "--tag", "v1")
    before = dict(hub.repositories[REPO].branches)
    with pytest.raises(ValueError, match="--tag v1"):
        push(checkpoint, "--tag", "v1", "--license", "mit")
    assert hub.repositories[REPO].branches == before


@pytest.mark.parametrize("refused", ["PUT /store/", f"POST /api/models/{REPO}/commit/"])
def test_failed_upload_leaves_the_repository_unchanged(hub, checkpoint, refused):
    hub.refused = refused
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        push(checkpoint)
    assert HfApi().list_repo_files(REPO) == [".gitattributes"]
    hub.refused = "nothing"
    push(checkpoint)  # and the next attempt succeeds
    assert set(HfApi().list_repo_files(REPO)) == published(checkpoint)


def test_new_version_keeps_files_of_the_owner(hub, checkpoint):
    api = HfApi()
    api.create_repo(REPO)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "old_code.py", "docs/a.png"):
        api.upload_file(path_or_fileobj=b"old", path_in_repo=name, repo_id=REPO)
    push(checkpoint)
    assert set(api.list_repo_files(REPO)) == published(checkpoint) | {"docs/a.png"}
    push(checkpoint)  # nothing new: no commit
    assert len(hub.repositories[REPO].commits) == 6


def test_wrong_options_raise(hub, checkpoint, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--repo_id model"):
        push_to_hub.main(["--model", str(checkpoint), "--repo_id", "model"])
    with pytest.raises(ValueError, match="nowhere.*config.json"):
        push(tmp_path / "nowhere")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HfHubHTTPError, match="401"):
        push(checkpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with pytest.raises(HfHubHTTPError, match="403"):
        push(checkpoint)
    (checkpoint / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="processor_config.json"):
        push(checkpoint)
    assert not hub.repositories


def test_incomplete_models_raise(hub, checkpoint):
    config = TripsConfig.from_pretrained(checkpoint)
    TripsModel(config).save_pretrained(checkpoint)  # weights without a decoder
    config.architectures = ["TripsForQuestionAnswering"]
    config.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="missing_keys .*decoder"):
        push(checkpoint)
    for architecture in ("BertModel", "TripsVisionModel", "convert_to_rgb"):
        config.architectures = [architecture]
        config.save_pretrained(checkpoint)
        with pytest.raises(ValueError, match=architecture):
            push(checkpoint)
    TripsVisionModel(config.vision_config).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="TripsVisionModel"):
        push(checkpoint)
    assert not hub.repositories


def test_non_finite_weights_raise(hub, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.dense.bias"][0] = torch.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lm_head.dense.bias"):
        push(checkpoint)
    assert not hub.repositories


def test_exported_model_raises(hub, checkpoint):
    (checkpoint / "export.json").write_text("{}")
    with pytest.raises(ValueError, match="exported"):
        push(checkpoint)
    assert not hub.repositories


def test_foreign_code_is_not_published(hub, checkpoint):
    name_foreign_code(checkpoint)
    push(checkpoint)
    repository = hub.repositories[REPO]
    files = repository.commits[repository.branches["main"]]
    assert [name for name, content in files.items() if name.endswith(".json") and b"foreign" in content] == []


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("config.json", {"vision_config": {"auto_map": {"AutoModel": "mallory/foreign--modeling.Model"}}}),
        ("config.json", {"custom_pipelines": {"text-generation": {"impl": "pipeline_trips.TripsPipeline"}}}),
        ("generation_config.json", {"custom_generate": "mallory/foreign"}),
        ("1_Dense/config.json", {"parts": [{"auto_map": {"AutoConfig": "mallory/foreign--c.C"}}]}),
    ],
)
def test_reference_to_foreign_code_raises(checkpoint, tmp_path, name, fields):
    path = tmp_path / "target" / name
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"{name}: `[\w.]*(auto_map|custom_pipelines|custom_generate)`"):
        check_code(tmp_path / "target", TripsForQuestionAnswering.from_pretrained(checkpoint))


def test_changed_python_files_raise(checkpoint):
    model = TripsForQuestionAnswering.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="other.py"):
        check_code(checkpoint, model)
    (checkpoint / "other.py").unlink()
    with (checkpoint / "modeling_trips.py").open("a") as file:
        file.write("import os\n")
    with pytest.raises(ValueError, match="modeling_trips.py"):
        check_code(checkpoint, model)


def test_output_dir_keeps_the_files(hub, checkpoint, tmp_path):
    target = tmp_path / "new" / "folder"
    push(checkpoint, "--dry_run", "--output_dir", str(target))
    assert {path.name for path in target.iterdir()} == published(checkpoint) - {".gitattributes"}
    with pytest.raises(ValueError, match=target.name):
        push(checkpoint, "--dry_run", "--output_dir", str(target))
    assert not hub.repositories


# `push_to_hub` and `save_pretrained` of model and processor


def push_parts(model_class, folder, copy=None):
    """Publish with `push_to_hub`, or with `save_pretrained` into the folder `copy` if given."""
    for part in (model_class.from_pretrained(folder), TripsProcessor.from_pretrained(folder)):
        if copy is None:
            part.push_to_hub(REPO)
        else:
            part.save_pretrained(copy, push_to_hub=True, repo_id=REPO)


@pytest.mark.parametrize("model_class", [TripsForQuestionAnswering, TripsForRetrieval])
@pytest.mark.parametrize("by_saving", [False, True])
def test_push_to_hub_uploads_model_and_processor(hub, checkpoints, tmp_path, model_class, by_saving):
    folder = checkpoints[model_class.__name__]
    push_parts(model_class, folder, str(tmp_path / "copy") if by_saving else None)
    repository = hub.repositories[REPO]
    files = repository.commits[repository.branches["main"]]
    assert files.keys() == {path.name for path in folder.iterdir()} | {"README.md", ".gitattributes"}
    noted = ("config.json", "tokenizer_config.json")  # loading adds fields to these files
    assert [
        path.name for path in folder.iterdir() if path.name not in noted and files[path.name] != path.read_bytes()
    ] == []
    assert ModelCard(files["README.md"].decode()).data.library_name == "transformers"


def test_parts_are_published_with_their_code(hub, checkpoints):
    TripsVisionModel.from_pretrained(checkpoints["TripsModel"]).push_to_hub(REPO)
    repository = hub.repositories[REPO]
    files = repository.commits[repository.branches["main"]]
    assert {"README.md", "config.json", "model.safetensors", "modeling_trips_vision.py"} <= files.keys()
