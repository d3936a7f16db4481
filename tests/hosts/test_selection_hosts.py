"""All patched models: complete removal, static shapes and lengths of sequences."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from tiny_hosts import (
    HOSTS,
    INPUT_IDS,
    KEPT,
    PIXELS,
    RATE,
    each_host,
    kept_by,
)
from tiny_models import LargestSquare, enable_checkpointing
from torch import nn
from transformers import (
    PreTrainedModel,
)

from modeling_trips.hosts.apply import record_patch_selection, remove_patch_selection
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


@each_host
def test_sequence_lengths_follow_the_keep_rate(host):
    model = host.make_model()
    host.apply(model)
    assert [indices.shape[1] for indices in kept_by(host, model)] == KEPT
    host.apply(model, fuse=False)  # ceil(.7 * 16) = 12 -> ceil(.7 * 12) = 9
    kept = kept_by(host, model)
    assert [indices.shape[1] for indices in kept] == [12, 9]
    assert not any((indices == -1).any() for indices in kept)


def snapshot(model: nn.Module) -> dict:
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
    expected, before = host.run(model), snapshot(model)
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
    expected, parameters = host.run(model), dict(model.named_parameters())
    keys = list(model.state_dict())
    host.apply(model)
    assert list(model.state_dict()) == keys
    named = dict(model.named_parameters())
    assert list(named) == list(parameters) and all(named[name] is parameters[name] for name in named)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(tmp_path)
        plain = type(model).from_pretrained(tmp_path).eval()
    else:
        plain = host.make_model(seed=1)
        plain.load_state_dict(model.state_dict())
    assert torch.equal(host.run(plain), expected)
    host.apply(plain)
    assert torch.equal(host.run(plain), host.run(model))


@each_host
def test_rows_do_not_depend_on_their_order(host):
    model = host.make_model()
    host.apply(model)
    order = torch.tensor([2, 0, 1])
    shuffled = {name: tensor[order] for name, tensor in host.inputs.items()}
    for actual, expected in zip(kept_by(host, model, shuffled), kept_by(host, model)):
        assert torch.equal(actual, expected[order])
    actual, expected = host.run(model, shuffled), host.run(model)
    if actual.shape == (3, 3):  # all images against all texts
        expected = expected[order][:, order]
    elif len(expected) == 3:
        expected = expected[order]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


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
    assert output.dtype == torch.bfloat16 and output.isfinite().all()
    for actual, indices in zip(kept_by(host, model, inputs), expected):
        common = sum(len(set(a) & set(b)) for a, b in zip(actual.tolist(), indices.tolist()))
        assert common >= 0.8 * sum(len(set(b)) for b in indices.tolist())


@pytest.mark.parametrize("name", [name for name in HOSTS if name != "bridgetower"])  # which does not support it
def test_activation_checkpointing_changes_no_gradient(name):
    host = HOSTS[name]
    model = host.make_model().train()
    host.run(model).square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    host.apply(model)
    layer = next(
        module for module in model.modules() if isinstance(module, ModuleWrapper) and hasattr(module, "selection")
    )
    norms = [module for module in layer.children() if isinstance(module, nn.LayerNorm)]
    calls = []
    norms[0].register_forward_hook(lambda *_: calls.append(1))

    def gradients() -> dict[str, torch.Tensor]:
        calls.clear()
        model.zero_grad(set_to_none=True)
        host.run(model).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert len(calls) == 1 and expected.keys() >= trained
    if isinstance(model, PreTrainedModel):
        enable_checkpointing(model)
    else:
        model.set_grad_checkpointing()
    actual = gradients()
    assert len(calls) == 2  # the selection layer ran again in the backward pass
    assert actual.keys() == expected.keys()
    for parameter, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=0, atol=1e-6)


def test_what_was_set_meanwhile_stays():
    """The mode and checkpointing, set before or under selection, also hold under it and after it."""
    model = HOSTS["clip"].make_model()
    enable_checkpointing(model)
    HOSTS["clip"].apply(model)
    layers = model.vision_model.encoder.layers
    assert layers[0].gradient_checkpointing and not layers[0].training
    model.train()
    model.gradient_checkpointing_disable()  # Transformers 5.24 has another name, too
    remove_patch_selection(model)
    assert layers[0].training and not layers[0].gradient_checkpointing


SLOW_TO_COMPILE = ("blip_vqa", "blip_retrieval", "blip_captioning", "bridgetower", "siglip")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_TO_COMPILE else []) for name in HOSTS]
)
def test_compiles_once_without_graph_breaks(name):
    torch._dynamo.reset()
    host = HOSTS[name]
    model, inputs = host.make_model(), host.inputs
    if name == "vilt":  # ViLT's pixel embedding loops over values, which breaks graphs
        inputs = {"input_ids": INPUT_IDS, "image_embeds": torch.randn(3, 17, 32), "pixel_mask": torch.ones(3, 17)}
    host.apply(model)
    graphs = []

    def count_graphs(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    compiled = torch.compile(model, backend=count_graphs, fullgraph=True)
    with torch.no_grad():
        for factor in (1.0, -1.0):
            batch = {key: x * factor if x.is_floating_point() and x.dim() > 2 else x for key, x in inputs.items()}
            actual, expected = host.main_output(compiled(**batch)), host.run(model, batch)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    # BLIP's text guidance is a hook, which PyTorch compiles as a separate graph.
    assert len(graphs) == (2 if name in ("blip_vqa", "blip_retrieval") else 1)


@pytest.mark.parametrize("name", ["clip", "siglip", "timm"])
def test_selection_computes_no_attention_map(name):
    host = HOSTS[name]
    model = host.make_model()
    host.apply(model)
    num_prefix = {"clip": 1, "siglip": 0, "timm": 3}[name]
    lengths = {num_prefix + num_candidates for num_candidates in (16, 13, 11)} - {16}  # heads are 16 wide
    for length in lengths:
        with torch.no_grad(), LargestSquare(length) as mode:
            host.run(model)
        assert not mode.found


@pytest.mark.parametrize("name", ["blip_vqa", "blip_captioning", "clip", "siglip"])
@pytest.mark.parametrize("recorded_before", [True, False])
def test_hidden_states_of_the_vision_tower_get_shorter(name, recorded_before):
    """Transformers hooks layers by class at the first request."""
    model = HOSTS[name].make_model()
    tower, num_prefix = model.vision_model, int(name != "siglip")
    if recorded_before:
        tower(PIXELS, output_hidden_states=True)
    HOSTS[name].apply(model)
    lengths = [num_prefix + length for length in (16, 13, 11, 11)]
    assert [states.shape[1] for states in tower(PIXELS, output_hidden_states=True).hidden_states] == lengths
    remove_patch_selection(model)
    hidden_states = tower(PIXELS, output_hidden_states=True).hidden_states
    assert [states.shape[1] for states in hidden_states] == [num_prefix + 16] * 4


def test_importing_loads_no_model_modules():
    code = """
import sys
import modeling_trips
before = {*sys.modules}
import modeling_trips.hosts
print([name for name in {*sys.modules} - before if ".models." in name or name.startswith("timm")])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
