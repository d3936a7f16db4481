"""Auto classes and pipelines with the project imported, and the `auto_map` of saved checkpoints."""

import json
import re
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
    AutoModel,
    AutoProcessor,
    pipeline,
)

import modeling_trips
from modeling_trips import (
    TripsConfig,
    TripsForQuestionAnswering,
    TripsForRetrieval,
    TripsModel,
    TripsPreTrainedModel,
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
        # Sentence Transformers loads retrieval models with `AutoModel`, for their features.
        assert type(AutoModel.from_pretrained(folder)) is (
            TripsForRetrieval if name == "TripsForRetrieval" else TripsModel
        )
        for auto_class, models in MODELS.items():
            model = getattr(transformers, auto_class).from_pretrained(folder)
            own = getattr(modeling_trips, name)
            assert type(model) is (own if own in models else models[0]), (name, auto_class)


def test_every_published_model_is_registered():
    """The `auto_map` of checkpoints lacks classes that no Auto class makes."""
    classes = {cls for cls in vars(modeling_trips).values() if isinstance(cls, type)}
    classes = {cls for cls in classes if issubclass(cls, TripsPreTrainedModel) and cls.config_class is TripsConfig}
    assert classes == {TripsPreTrainedModel, *HEADS}


@pytest.mark.parametrize("saved_twice", [False, True])
def test_a_checkpoint_names_its_class_and_the_bare_model(checkpoints, tmp_path, saved_twice):
    for name, folder in checkpoints.items():
        model_class = getattr(modeling_trips, name)
        if saved_twice:
            model_class.from_pretrained(folder).save_pretrained(tmp_path / name)
            folder = tmp_path / name
        auto_map = read_config(folder)["auto_map"]
        assert auto_map.keys() == {"AutoConfig", "AutoModel", *model_class.auto_classes}
        for reference in auto_map.values():
            module, class_name = reference.split(".")
            assert re.search(rf"^class {class_name}\b", (folder / f"{module}.py").read_text(), re.MULTILINE)
        for auto_class in model_class.auto_classes:
            assert auto_map[auto_class].endswith(f".{name}")


def test_a_checkpoint_holds_the_code_that_its_class_imports_and_no_other(checkpoints):
    code = {name: {path.stem for path in folder.glob("*.py")} for name, folder in checkpoints.items()}
    for head, module in (("Retrieval", "pretraining"), ("VisualGrounding", "grounding")):
        own = code[f"TripsFor{head}"] - code["TripsForQuestionAnswering"]
        assert own - {"pipeline_trips_retrieval"} == {f"modeling_trips_{module}"}
    assert code["TripsForQuestionAnswering"] >= {"configuration_trips", "pipeline_trips", "processing_trips"}


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


def test_a_part_is_saved_with_the_auto_classes_of_its_configuration(tmp_path):
    TripsVisionModel(TripsConfig.from_preset("tiny").vision_config).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config["auto_map"] == {
        "AutoConfig": "configuration_trips.TripsVisionConfig",
        "AutoModel": "modeling_trips_vision.TripsVisionModel",
    }
    assert "custom_pipelines" not in config


def test_saving_names_no_code_of_others_in_the_configuration(checkpoints, tmp_path):
    folder, saved = shutil.copytree(checkpoints["TripsForQuestionAnswering"], tmp_path / "hostile"), tmp_path / "saved"
    name_foreign_code(folder)
    TripsForQuestionAnswering.from_pretrained(folder).save_pretrained(saved)
    for field in ("auto_map", "custom_pipelines"):
        assert read_config(saved)[field] == read_config(checkpoints["TripsForQuestionAnswering"])[field]


def test_a_checkpoint_lists_the_pipelines_of_its_head_alone(checkpoints):
    tasks = {name: sorted(read_config(folder).get("custom_pipelines", {})) for name, folder in checkpoints.items()}
    assert {name: own for name, own in tasks.items() if own} == {
        "TripsForConditionalGeneration": ["image-to-text"],
        "TripsForQuestionAnswering": ["visual-question-answering"],
        "TripsForRetrieval": ["zero-shot-image-classification"],
    }


@pytest.mark.parametrize("name", ["TripsModel", "TripsForQuestionAnswering"])
@pytest.mark.parametrize(("part_class", "part"), [(TripsVisionModel, "vision_model"), (TripsTextModel, "text_model")])
def test_parts_load_from_the_checkpoint_of_a_whole_model(checkpoints, tmp_path, name, part_class, part):
    weights = load_file(checkpoints[name] / "model.safetensors")
    prefix = f"{part}." if name == "TripsModel" else f"model.{part}."
    expected = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    model, info = part_class.from_pretrained(checkpoints[name], output_loading_info=True)
    assert not info["missing_keys"] and len(info["unexpected_keys"]) == len(weights) - len(expected)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
    again, info = part_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())


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
    "without the name": lambda task, own, model, processor, folder: pipeline(model=folder, trust_remote_code=True),
    "by name and class": lambda task, own, model, processor, folder: pipeline(task, model=folder, pipeline_class=own),
    "a loaded model": lambda task, own, model, processor, folder: own(model=model, processor=processor),
    "a loaded model, by name": lambda task, own, model, processor, folder: pipeline(
        task, model=model, config=model.config, processor=processor, pipeline_class=own
    ),
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
