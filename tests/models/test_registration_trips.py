"""Auto classes and pipelines with the project imported, and the `auto_map` of saved checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from foreign_code import name_foreign_code
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoConfig,
    AutoProcessor,
    pipeline,
)

import modeling_trips
from modeling_trips import (
    TripsConfig,
    TripsForQuestionAnswering,
    TripsProcessor,
    TripsTextModel,
    TripsVisionModel,
)
from modeling_trips.registration_trips import MODELS


HEADS = sorted({model for models in MODELS.values() for model in models if model.config_class is TripsConfig}, key=str)
TIED = {
    name.removeprefix("model.") for head in HEADS for pair in (head._tied_weights_keys or {}).items() for name in pair
}


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_auto_classes_make_the_class_of_the_checkpoint(checkpoints):
    for name, folder in checkpoints.items():
        assert type(AutoConfig.from_pretrained(folder)) is TripsConfig
        assert type(AutoProcessor.from_pretrained(folder)) is TripsProcessor
        own = getattr(modeling_trips, name)
        for auto_class, models in MODELS.items():
            if own in models or auto_class == "AutoModel" or name == "TripsForPreTraining":
                model = getattr(transformers, auto_class).from_pretrained(folder)
                assert type(model) is (own if own in models else models[0]), (name, auto_class)


def test_a_checkpoint_names_its_class_and_the_bare_model(checkpoints):
    for name, folder in checkpoints.items():
        auto_classes, auto_map = getattr(modeling_trips, name).auto_classes, read_config(folder)["auto_map"]
        assert auto_map.keys() == {"AutoConfig", "AutoModel", *auto_classes}
        assert all(auto_map[auto_class].endswith(f".{name}") for auto_class in auto_classes)


def test_a_model_that_fsdp_shards_is_saved_under_its_own_class(checkpoints, tmp_path):
    """FSDP2 makes a class of its own, in a file of PyTorch."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        folder = checkpoints["TripsForQuestionAnswering"]
        model = TripsForQuestionAnswering.from_pretrained(folder)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model.save_pretrained(tmp_path, state_dict=get_model_state_dict(model, options=StateDictOptions(True)))
    finally:
        torch.distributed.destroy_process_group()
    code = {path.name for path in tmp_path.glob("*.py")}
    assert code and code == {path.name for path in folder.glob("*.py")}
    for field in ("architectures", "auto_map", "custom_pipelines"):
        assert read_config(tmp_path)[field] == read_config(folder)[field]
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_saving_names_no_code_of_others_in_the_configuration(checkpoints, tmp_path):
    folder, saved = shutil.copytree(checkpoints["TripsForQuestionAnswering"], tmp_path / "hostile"), tmp_path / "saved"
    name_foreign_code(folder)
    TripsForQuestionAnswering.from_pretrained(folder).save_pretrained(saved)
    for field in ("auto_map", "custom_pipelines"):
        assert read_config(saved)[field] == read_config(checkpoints["TripsForQuestionAnswering"])[field]


@pytest.mark.parametrize(("part_class", "part"), [(TripsVisionModel, "vision_model"), (TripsTextModel, "text_model")])
def test_parts_load_from_the_checkpoint_of_a_whole_model(checkpoints, tmp_path, part_class, part):
    folder, prefix = checkpoints["TripsForQuestionAnswering"], f"model.{part}."
    weights = load_file(folder / "model.safetensors")
    expected = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    model, info = part_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and len(info["unexpected_keys"]) == len(weights) - len(expected)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert read_config(tmp_path)["auto_map"]["AutoModel"].endswith(f".{part_class.__name__}")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


@pytest.mark.parametrize("model_class", HEADS)
def test_every_class_loads_from_checkpoints_of_others_and_reports_what_is_missing(checkpoints, model_class):
    for name in ("TripsForQuestionAnswering", "TripsForPreTraining"):
        folder = checkpoints[name]
        saved = {key.removeprefix("model."): value for key, value in load_file(folder / "model.safetensors").items()}
        model, info = model_class.from_pretrained(folder, output_loading_info=True)
        state = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
        for key in saved.keys() & state.keys():
            assert torch.equal(state[key], saved[key]), (name, key)
        missing = {key.removeprefix("model.") for key in info["missing_keys"]}
        assert missing - TIED == state.keys() - saved.keys() - TIED, name


CALLS = {
    "by name": lambda task, own, model, processor, folder: pipeline(task, model=folder, trust_remote_code=True),
    "by name and class": lambda task, own, model, processor, folder: pipeline(task, model=folder, pipeline_class=own),
    "a loaded model": lambda task, own, model, processor, folder: own(model=model, processor=processor),
}


@pytest.mark.parametrize("model_class", [head for head in HEADS if head.pipeline_class])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_documented_way_makes_the_pipeline(checkpoints, model_class, call):
    own = model_class.pipeline_class
    task = own.default_task
    folder = str(checkpoints[model_class.__name__])
    model, processor = model_class.from_pretrained(folder), TripsProcessor.from_pretrained(folder)
    made = call(task, own, model, processor, folder)
    assert (type(made).__name__, made.task) == (own.__name__, task)
    assert made.model.config.architectures == [model_class.__name__] and made.processor.patch_size == 8
