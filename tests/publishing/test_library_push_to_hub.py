"""`push_to_hub` of model and processor writes a repository that is complete for loading."""

import pytest
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

from modeling_trips import TripsForQuestionAnswering, TripsForRetrieval, TripsProcessor, TripsVisionModel


REPO = "ada/trips-test"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub(users={"hf_ada": "ada"}) as hub:
        hub.connect(monkeypatch, tmp_path / "home", token="hf_ada")
        yield hub


def push(model_class, folder, copy=None):
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
    push(model_class, folder, str(tmp_path / "copy") if by_saving else None)
    repository = hub.repositories[REPO]
    published = repository.commits[repository.branches["main"]]
    assert published.keys() == {path.name for path in folder.iterdir()} | {"README.md", ".gitattributes"}
    noted = ("config.json", "tokenizer_config.json")  # loading adds fields to these files
    assert [
        path.name for path in folder.iterdir() if path.name not in noted and published[path.name] != path.read_bytes()
    ] == []
    assert ModelCard(published["README.md"].decode()).data.library_name == "transformers"


def test_published_model_loads_from_the_hub(hub, checkpoints):
    folder = checkpoints["TripsForQuestionAnswering"]
    push(TripsForQuestionAnswering, folder)
    model, report = AutoModelForVisualQuestionAnswering.from_pretrained(REPO, output_loading_info=True)
    assert type(model) is TripsForQuestionAnswering and not any(report.values())
    assert type(AutoProcessor.from_pretrained(REPO)) is TripsProcessor


def test_parts_are_published_with_their_code(hub, checkpoints):
    TripsVisionModel.from_pretrained(checkpoints["TripsModel"]).push_to_hub(REPO)
    repository = hub.repositories[REPO]
    published = repository.commits[repository.branches["main"]]
    assert {"README.md", "config.json", "model.safetensors", "modeling_trips_vision.py"} <= published.keys()
