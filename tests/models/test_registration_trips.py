"""Auto classes, pipelines and examples of all heads, and the `auto_map` of saved checkpoints."""

import doctest
import re
import shutil

import pytest
import torch
import transformers
from foreign_code import name_foreign_code
from json_files import read_json
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor, pipeline

import modeling_trips
from modeling_trips import TripsConfig, TripsForQuestionAnswering, TripsProcessor, TripsTextModel, TripsVisionModel
from modeling_trips.registration_trips import MODELS


HEADS = sorted({model for models in MODELS.values() for model in models if model.config_class is TripsConfig}, key=str)
TIED = set()
for head in HEADS:
    for pair in (head._tied_weights_keys or {}).items():
        TIED.update(name.removeprefix("model.") for name in pair)


@pytest.mark.parametrize("model_class", HEADS)
def test_the_example_of_each_head_runs(model_class):
    """It prints the documented output."""
    examples = re.findall(r"```python\n(.*?)```", model_class.forward.__doc__, re.DOTALL)
    assert examples
    for code in examples:
        test = doctest.DocTestParser().get_doctest(code, {}, model_class.__name__, None, 0)
        assert test.examples
        assert doctest.DocTestRunner().run(test).failed == 0


def read_config(folder):
    return read_json(folder / "config.json")


def test_auto_classes_make_the_class_of_the_checkpoint(checkpoints):
    for name, folder in checkpoints.items():
        assert type(AutoConfig.from_pretrained(folder)) is TripsConfig
        assert type(AutoProcessor.from_pretrained(folder)) is TripsProcessor
        model_class = getattr(modeling_trips, name)
        for auto_class, models in MODELS.items():
            if model_class in models or auto_class == "AutoModel" or name == "TripsForPreTraining":
                model = getattr(transformers, auto_class).from_pretrained(folder)
                expected = model_class if model_class in models else models[0]
                assert type(model) is expected, (name, auto_class)


def test_a_checkpoint_names_its_class_and_the_bare_model(checkpoints):
    for name, folder in checkpoints.items():
        auto_classes = getattr(modeling_trips, name).auto_classes
        auto_map = read_config(folder)["auto_map"]
        assert auto_map.keys() == {"AutoConfig", "AutoModel", *auto_classes}
        assert all(auto_map[auto_class].endswith(f".{name}") for auto_class in auto_classes)


def test_saving_names_no_code_of_others_in_the_configuration(checkpoints, tmp_path):
    original = checkpoints["TripsForQuestionAnswering"]
    hostile = shutil.copytree(original, tmp_path / "hostile")
    name_foreign_code(hostile)
    TripsForQuestionAnswering.from_pretrained(hostile).save_pretrained(tmp_path / "saved")
    for field in ("auto_map", "custom_pipelines"):
        assert read_config(tmp_path / "saved")[field] == read_config(original)[field]


@pytest.mark.parametrize("part_class, part", [(TripsVisionModel, "vision_model"), (TripsTextModel, "text_model")])
def test_parts_load_from_the_checkpoint_of_a_whole_model(checkpoints, tmp_path, part_class, part):
    folder = checkpoints["TripsForQuestionAnswering"]
    weights = load_file(folder / "model.safetensors")
    prefix = f"model.{part}."
    expected = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    model, info = part_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert len(info["unexpected_keys"]) == len(weights) - len(expected)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors"), expected, rtol=0, atol=0)
    assert read_config(tmp_path)["auto_map"]["AutoModel"].endswith(f".{part_class.__name__}")


@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize("name", ["TripsForQuestionAnswering", "TripsForPreTraining"])
def test_every_class_loads_from_checkpoints_of_others_and_reports_what_is_missing(checkpoints, name, model_class):
    def without_prefix(weights):
        return {key.removeprefix("model."): value for key, value in weights.items()}

    saved = without_prefix(load_file(checkpoints[name] / "model.safetensors"))
    model, info = model_class.from_pretrained(checkpoints[name], output_loading_info=True)
    state = without_prefix(model.state_dict())
    for key in saved.keys() & state.keys():
        assert torch.equal(state[key], saved[key]), key
    missing = {key.removeprefix("model.") for key in info["missing_keys"]}
    assert missing - TIED == state.keys() - saved.keys() - TIED


@pytest.mark.parametrize("model_class", [head for head in HEADS if head.pipeline_class])
@pytest.mark.parametrize("way", ["by name", "by name and class", "a loaded model"])
def test_every_documented_way_makes_the_pipeline(checkpoints, model_class, way):
    pipeline_class = model_class.pipeline_class
    task = pipeline_class.default_task
    folder = str(checkpoints[model_class.__name__])
    if way == "by name":
        made = pipeline(task, model=folder, trust_remote_code=True)
    elif way == "by name and class":
        made = pipeline(task, model=folder, pipeline_class=pipeline_class)
    else:
        model = model_class.from_pretrained(folder)
        made = pipeline_class(model=model, processor=TripsProcessor.from_pretrained(folder))
    assert type(made).__name__ == pipeline_class.__name__
    assert made.task == task
    assert made.model.config.architectures == [model_class.__name__]
    assert made.processor.patch_size == 8
