"""Applying, recording and removing selection in all patched models with vision towers or joint layers."""

import copy
import pickle
import re
import sys

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from programs import output_of
from schedules import schedule_of
from timm.models.vision_transformer import ParallelScalingBlock
from tiny_hosts import (
    HOSTS,
    LAYERS,
    PIXELS,
    RATE,
    each_host,
    kept_by,
    make_blip,
    make_bridgetower,
    make_clip,
    make_timm,
)
from tiny_models import enable_checkpointing
from torch import nn
from transformers import BlipForConditionalGeneration, CLIPForImageClassification, PreTrainedModel

from modeling_trips.hosts import apply_patch_selection, record_patch_selection, remove_patch_selection
from modeling_trips.hosts.layers import ModuleWrapper


@each_host
def test_keep_rate_one_changes_nothing(host):
    model = host.make_model()
    expected = host.run(model)
    host.apply(model, rate=1.0)
    assert torch.equal(host.run(model), expected)
    host.apply(model, rate=[1.0, RATE])  # only the other layer selects
    with record_patch_selection(model) as selections:
        host.run(model)
    assert [selection.kept_indices.shape[1] for selection in selections] == [12]


def snapshot(model):
    """Return the identities of all modules, their attributes and the contents of their dictionaries."""

    def identity(value):
        return id(value), [(key, id(item)) for key, item in value.items()] if isinstance(value, dict) else None

    return {
        name: (id(module), {key: identity(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }


@each_host
def test_removing_selection_leaves_no_trace(host):
    model = host.make_model()
    expected = host.run(model)
    before = snapshot(model)
    host.apply(model)
    assert not torch.equal(host.run(model), expected)
    kept_by(host, model)
    host.apply(model, rate=0.5)  # replaces the first
    remove_patch_selection(model)
    assert snapshot(model) == before
    assert not any(isinstance(module, ModuleWrapper) for module in model.modules())
    assert torch.equal(host.run(model), expected)
    remove_patch_selection(model)  # nothing to remove


@each_host
def test_checkpoints_have_the_same_names_and_load_without_selection(host, tmp_path):
    model = host.make_model()
    expected = host.run(model)
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    host.apply(model)
    assert list(model.state_dict()) == keys
    named = dict(model.named_parameters())
    assert list(named) == list(parameters)
    assert all(named[name] is parameters[name] for name in named)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(tmp_path)
        plain = type(model).from_pretrained(tmp_path).eval()
    else:
        plain = host.make_model(seed=1)
        plain.load_state_dict(model.state_dict())
    assert torch.equal(host.run(plain), expected)
    host.apply(plain)
    assert torch.equal(host.run(plain), host.run(model))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@each_host
def test_copies_are_independent(host, make_copy):
    model = host.make_model()
    host.apply(model)
    copied = make_copy(model)
    expected = host.run(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(host.run(copied), expected)
    remove_patch_selection(copied)
    assert not any(isinstance(module, ModuleWrapper) for module in copied.modules())
    assert not torch.equal(host.run(copied), expected)


@each_host
def test_bfloat16_keeps_nearly_the_same_patches(host):
    model = host.make_model()
    host.apply(model)
    expected = kept_by(host, model)
    model.to(torch.bfloat16)
    inputs = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in host.inputs.items()}
    output = host.run(model, inputs)
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    for actual, indices in zip(kept_by(host, model, inputs), expected):
        common = sum(len(set(a) & set(b)) for a, b in zip(actual.tolist(), indices.tolist()))
        assert common >= 0.8 * sum(len(set(b)) for b in indices.tolist())


def test_what_was_set_meanwhile_stays():
    """The mode and checkpointing, set before or under selection, also hold under it and after it."""
    model = HOSTS["clip"].make_model()
    enable_checkpointing(model)
    HOSTS["clip"].apply(model)
    layers = model.vision_model.encoder.layers
    assert layers[0].gradient_checkpointing
    assert not layers[0].training
    model.train()
    model.gradient_checkpointing_disable()  # Transformers 5.24 has another name, too
    remove_patch_selection(model)
    assert layers[0].training
    assert not layers[0].gradient_checkpointing


@pytest.mark.parametrize("name", ["blip_vqa", "blip_captioning", "clip", "siglip"])
@pytest.mark.parametrize("recorded_before", [True, False])
def test_hidden_states_of_the_vision_tower_get_shorter(name, recorded_before):
    """Transformers hooks layers by class at the first request."""
    model = HOSTS[name].make_model()
    tower = model.vision_model
    num_prefix = int(name != "siglip")
    if recorded_before:
        tower(PIXELS, output_hidden_states=True)
    HOSTS[name].apply(model)
    lengths = [num_prefix + length for length in (16, 13, 11, 11)]
    assert [states.shape[1] for states in tower(PIXELS, output_hidden_states=True).hidden_states] == lengths
    remove_patch_selection(model)
    hidden_states = tower(PIXELS, output_hidden_states=True).hidden_states
    assert [states.shape[1] for states in hidden_states] == [num_prefix + 16] * 4


@pytest.mark.slow
def test_importing_loads_no_model_modules():
    code = "import sys, modeling_trips; old = {*sys.modules}; import modeling_trips.hosts; print({*sys.modules} - old)"
    loaded = output_of(sys.executable, "-c", code)
    assert "modeling_trips.hosts" in loaded
    assert not re.search(r"\.models\.|'timm", loaded)


@pytest.mark.parametrize(
    "make_model, schedule, error",
    [
        (lambda: nn.Linear(2, 2), "1:image:0.5", TypeError),
        (lambda: make_clip(CLIPForImageClassification), "1:image:0.5", TypeError),
        (lambda: make_timm(block_fn=ParallelScalingBlock), "1:image:0.5", TypeError),
        (lambda: make_timm(attn_layer="diff"), "1:image:0.5", TypeError),
        (make_bridgetower, "1:image:0.5,3:image:0.5", ValueError),  # after its first bridge
        (make_bridgetower, "1:text:0.5", ValueError),
        (make_timm, "1:text:0.5", ValueError),
        (lambda: make_blip(BlipForConditionalGeneration), "1:text:0.5", ValueError),
        (lambda: make_clip(hidden_size=16), "1:text:0.5", ValueError),  # another width than the tower's
        (make_clip, "1:random:0.5", ValueError),  # of generative models alone
    ],
)
def test_unsupported_models_and_schedules_raise(make_model, schedule, error):
    with pytest.raises(error):
        apply_patch_selection(make_model(), schedule)


@pytest.mark.parametrize("schedule", ["2:image,4:image", "1:image:0.5:0.9"])
def test_bad_schedule_raises_and_leaves_the_model_unchanged(schedule):
    host = HOSTS["clip"]
    model = host.make_model()
    host.apply(model)
    expected = host.run(model)
    with pytest.raises(ValueError):
        apply_patch_selection(model, schedule)
    assert torch.equal(host.run(model), expected)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_text_embeds_are_given_if_and_only_if_they_are_used(name):
    model = HOSTS[name].make_model()
    for guidance, shapes in (("text", [None, (2, 32), (3, 5, 32)]), (["image", "text"], [None]), ("image", [(3, 32)])):
        apply_patch_selection(model, schedule_of(LAYERS, RATE, guidance))
        for shape in shapes:
            with pytest.raises(ValueError, match="text_embeds"):
                model.get_image_features(PIXELS, **({"text_embeds": torch.zeros(shape)} if shape else {}))


def test_compiled_or_hooked_layers_raise():
    hooked, compiled, patched = (HOSTS["clip"].make_model() for _ in range(3))
    HOSTS["clip"].apply(patched)
    for model in (hooked, patched):
        add_hook_to_module(model.vision_model.encoder.layers[0], ModelHook())
    compiled.vision_model.encoder.layers[1].compile()
    for model in (hooked, compiled):
        with pytest.raises(ValueError):
            HOSTS["clip"].apply(model)
    with pytest.raises(ValueError):
        remove_patch_selection(patched)
