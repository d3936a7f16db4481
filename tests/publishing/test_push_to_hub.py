"""Publishing with `examples/push_to_hub.py` to a local Hub: published files, private files, and the card's code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from clean_environment import make_environment
from foreign_code import make_foreign_repository, name_foreign_code
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from loopback_hub import LoopbackHub
from places import ROOT
from safetensors.torch import load_file, save_file
from transformers import BlipImageProcessor

import modeling_trips
from modeling_trips import TripsConfig, TripsForQuestionAnswering, TripsModel, TripsProcessor, TripsVisionModel
from modeling_trips.publishing.model_card import HEADS
from modeling_trips.publishing.repository import check_code
from trips_examples import push_to_hub
from trips_examples.data.vocabulary import train_wordpiece_tokenizer
from trips_examples.training.models import make_processor


REPO = "ada/trips-test"
LEFTOVERS = {"eval_results.json", "training_args.bin", "optimizer.pt", "predictions.jsonl", "other.py", ".env"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub(users={"hf_ada": "ada", "hf_bob": "bob"}) as hub:
        hub.connect(monkeypatch, tmp_path / "home", token="hf_ada")
        yield hub


def make_checkpoint(folder: Path, model_class=TripsForQuestionAnswering) -> Path:
    """Write the files of a training: model, processor, results, and private files."""
    tokenizer = train_wordpiece_tokenizer(["what color is it?", "red blue yes no"])
    config = TripsConfig.from_preset("tiny", text_config={"vocab_size": len(tokenizer)})
    model_class(config).save_pretrained(folder)
    make_processor(tokenizer, config).save_pretrained(folder)
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
    with pytest.raises(ValueError, match="foreign"):
        push(checkpoint)
    assert not hub.repositories


class StrangeImageProcessor(BlipImageProcessor):
    """Image processor with foreign code."""


def test_foreign_image_processor_raises(checkpoint, tmp_path, monkeypatch):
    model, processor = (
        TripsForQuestionAnswering.from_pretrained(checkpoint),
        TripsProcessor.from_pretrained(checkpoint),
    )
    monkeypatch.setattr(StrangeImageProcessor, "_auto_class", "AutoImageProcessor")
    processor.image_processor = StrangeImageProcessor()
    model.save_pretrained(tmp_path / "saved")
    check_code(tmp_path / "saved", model)
    processor.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=Path(__file__).name):
        check_code(tmp_path / "saved", model)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("config.json", {"vision_config": {"auto_map": {"AutoModel": "mallory/foreign--modeling.Model"}}}),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "modeling_trips.TripsModel"}}),
        ("config.json", {"custom_pipelines": {"text-generation": {"impl": "pipeline_trips.TripsPipeline"}}}),
        ("tokenizer_config.json", {"auto_map": ["tokenization.Tokenizer", None]}),
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
    check_code(checkpoint, model)
    with (checkpoint / "modeling_trips.py").open("a") as file:
        file.write("import os\n")
    with pytest.raises(ValueError, match="modeling_trips.py"):
        check_code(checkpoint, model)


LOADING = """
import sys
import transformers

folder = sys.argv[1]
names = ("AutoModelForVisualQuestionAnswering", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
loaders = [getattr(transformers, name).from_pretrained for name in names]
for load in (*loaders, lambda model, **options: transformers.pipeline("visual-question-answering", model, **options)):
    try:
        load(folder, trust_remote_code=True)
    except Exception as error:
        print("failed:", error)
"""


@pytest.mark.slow
def test_published_files_do_not_run_foreign_code(checkpoint, tmp_path):
    repository = make_foreign_repository(tmp_path / "repository")
    name_foreign_code(checkpoint, repository)
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run(sys.executable, "-c", LOADING, checkpoint, env=environment, cwd=tmp_path)
    assert (repository / "ran").exists()
    (repository / "ran").unlink()
    push(checkpoint, "--dry_run", "--output_dir", str(tmp_path / "published"))
    printed = run(sys.executable, "-c", LOADING, tmp_path / "published", env=environment, cwd=tmp_path)
    assert not (repository / "ran").exists() and "failed" not in printed


def test_output_dir_keeps_the_files(hub, checkpoint, tmp_path):
    target = tmp_path / "new" / "folder"
    push(checkpoint, "--dry_run", "--output_dir", str(target))
    assert {path.name for path in target.iterdir()} == published(checkpoint) - {".gitattributes"}
    with pytest.raises(ValueError, match=target.name):
        push(checkpoint, "--dry_run", "--output_dir", str(target))
    assert not hub.repositories


def test_unlisted_file_raises(hub, checkpoint):
    processor = TripsProcessor.from_pretrained(checkpoint)
    processor.chat_template = {"default": "{{ messages }}", "private": "{{ messages }}"}
    processor.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="additional_chat_templates/private.jinja"):
        push(checkpoint)
    assert not hub.repositories


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory) -> Path:
    """Return a Python with the project's dependencies, without the project."""
    return make_environment(tmp_path_factory.mktemp("environment"))


def run(*words: str | Path, env: dict[str, str], cwd: Path) -> str:
    result = subprocess.run(words, env=os.environ | env, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_code_of_the_card_runs_without_the_project(head, hub, tmp_path, clean_python):
    folder = make_checkpoint(tmp_path / "checkpoint", getattr(modeling_trips, head))
    HfApi().create_repo(REPO, private=True)
    HfApi().create_branch(REPO, branch="next")
    command = [ROOT / "examples" / "push_to_hub.py", "--model", folder, "--repo_id", REPO, "--revision", "next"]
    environment = hub.client_environment(tmp_path / "publisher", token="hf_ada")
    assert "Published: " in run(sys.executable, *command, env=environment, cwd=ROOT)

    card = Path(huggingface_hub.hf_hub_download(REPO, "README.md", revision="next")).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    environment = hub.client_environment(tmp_path / "reader", token="hf_ada")
    there = run(clean_python, "-I", "-c", code, env=environment, cwd=tmp_path)
    environment = hub.client_environment(tmp_path / "author", token="hf_ada")
    here = run(sys.executable, "-c", f"import modeling_trips\n{code}", env=environment, cwd=ROOT)
    assert there == here and there.count("\n") >= 2  # scores and boxes to the last digit

    environment = hub.client_environment(tmp_path / "stranger", token="hf_bob")
    refused = subprocess.run(
        [clean_python, "-I", "-c", code], env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert refused.returncode != 0 and f"{REPO} is not a local folder" in refused.stderr
