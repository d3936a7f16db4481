"""Loading of checkpoints: all weights, a larger vocabulary, and weights on several devices."""

import torch
from tiny_models import CASES, assert_same_outputs, each_generator, each_model, loss_of, main_output
from torch.testing import assert_close

from modeling_trips import TripsConfig, TripsForConditionalGeneration
from modeling_trips.registration_trips import MODELS


def test_every_head_has_a_case():
    """A new head gets one entry in `CASES` of tests/helpers/tiny_models.py, unless it runs as another one does."""
    heads = {model for models in MODELS.values() for model in models if model.config_class is TripsConfig}
    assert {case.model_class for case in CASES} == heads - {TripsForConditionalGeneration}


def make_used_model(case):
    """Return a model with updated BatchNorm statistics."""
    model = case.make_model().train()
    loss_of(model(**case.make_inputs(training=True)))
    return model.eval()


def split_device_map(model):
    """Put every other indivisible module, and all remaining weights, on the disk."""
    names = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    device_map = {name: ("cpu", "disk")[number % 2] for number, name in enumerate(names)}
    whole = tuple(f"{name}." for name in names)
    for name, _ in model.named_parameters():
        if not name.startswith(whole):
            device_map[name.rpartition(".")[0]] = "disk"
    return device_map


def load_on_cpu_and_disk(case, model, folder):
    """Save a model in shards, and load it with some weights on the disk."""
    model.save_pretrained(folder / "checkpoint", max_shard_size="50KB")
    loaded = case.model_class.from_pretrained(
        folder / "checkpoint", device_map=split_device_map(model), offload_folder=folder / "offload"
    )
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu", "meta"}
    return loaded


@each_model
def test_parameters_and_buffers_come_back_from_shards_also_on_several_devices(case, tmp_path):
    model = make_used_model(case)
    assert_same_outputs(load_on_cpu_and_disk(case, model, tmp_path), model, case)
    assert len(list(tmp_path.glob("checkpoint/*.safetensors"))) > 1
    loaded, report = case.model_class.from_pretrained(tmp_path / "checkpoint", output_loading_info=True)
    assert not any(report.values())
    expected = model.state_dict()
    assert_close(loaded.state_dict(), expected, rtol=0, atol=0)
    statistics = [name for name in expected if "running" in name]
    assert len(statistics) == 4
    assert all(expected[name].unique().numel() > 1 for name in statistics)
    assert dict(loaded.named_buffers()).keys() <= expected.keys()  # none that a checkpoint leaves out


@each_model
def test_a_larger_vocabulary_reaches_every_table_and_its_checkpoint(case, tmp_path):
    model = case.make_model()
    expected = main_output(model(**case.make_inputs()))
    model.resize_token_embeddings(24)
    tables = [module for name, module in model.named_modules() if name.endswith("word_embeddings")]
    heads = [model.get_submodule(name.removesuffix(".weight")) for name in model.all_tied_weights_keys]
    assert {table.num_embeddings for table in tables} == {24}
    assert all(head.out_features == 24 for head in heads)
    assert {head.weight for head in heads} <= {table.weight for table in tables}
    resized = main_output(model(**case.make_inputs()))
    assert_close(resized[..., : expected.shape[-1]], expected)
    inputs = case.make_inputs(training=True)
    inputs["input_ids"][:, 1] = 23
    assert loss_of(model(**inputs)).isfinite()
    model.save_pretrained(tmp_path)
    assert_same_outputs(case.model_class.from_pretrained(tmp_path), model, case)


@each_generator
def test_an_offloaded_model_encodes_images_ahead_and_generates_the_same(case, tmp_path):
    model = make_used_model(case)
    loaded = load_on_cpu_and_disk(case, model, tmp_path)
    inputs = {name: tensor for name, tensor in case.make_inputs().items() if name not in case.inputs}
    expected = model.generate(**inputs, max_new_tokens=4)
    image_cache = loaded.model.encode_images(inputs.pop("pixel_values"))
    assert torch.equal(loaded.generate(**inputs, image_cache=image_cache, max_new_tokens=4), expected)
