"""A guide's folder: weights, sizes, values and card."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from json_files import read_json
from safetensors.torch import load_file, save_file

from modeling_trips.hosts import TextGuide


@pytest.fixture
def folder(tmp_path):
    TextGuide(32, 4, 8, layer=1).save_pretrained(tmp_path)
    return tmp_path


def test_a_guide_is_saved_and_loaded(folder):
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    loaded = TextGuide.from_pretrained(folder)
    assert (loaded.text_hidden_size, loaded.layer, loaded.training) == (32, 1, False)
    for name, weight in load_file(folder / "model.safetensors").items():
        assert torch.equal(loaded.state_dict()[name], weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {},
        lambda weights: {f"a{name}": weight for name, weight in weights.items()},
        lambda weights: {name: weight for name, weight in weights.items() if name != "query.bias"},
        lambda weights: weights | {"more": torch.zeros(1)},
        lambda weights: weights | {"query.bias": torch.zeros(5)},
        lambda weights: weights | {"query.bias": torch.full((32,), torch.nan)},
    ],
    ids=["none", "renamed", "missing", "extra", "size", "nan"],
)
def test_other_weights_are_refused(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError):
        TextGuide.from_pretrained(folder)


def test_sizes_are_checked_before_memory_is_taken(folder):
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"text_hidden_size": 10**12}))
    with pytest.raises(ValueError):  # 512 TB
        TextGuide.from_pretrained(folder)


def test_the_card_names_the_training(tmp_path):
    guide = TextGuide(32, 4, 8, layer=3, trained_with={"base model": "ada/llava", "keep rate": 0.11})
    guide.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "again"):  # the facts are part of the guide
        card = ModelCard.load(folder / "README.md")
        assert "3:text:0.11" in card.text
        assert "ada/llava" in card.text
        assert "More Information" not in card.text
        assert (card.data.library_name, card.data.base_model) == ("trips-transformers", "ada/llava")
        TextGuide.from_pretrained(folder).save_pretrained(tmp_path / "again")
