"""int8 by torchao and LoRA adapters by PEFT, which replace the linear layers of selection."""

import re
from importlib.util import find_spec

import pytest
import torch
from clean_environment import make_environment
from peft import LoraConfig, PeftModel, get_peft_model
from places import ROOT
from programs import output_of
from tiny_models import CASES, assert_same_outputs, kept_by, loss_of, main_output, share_of_kept
from transformers import TorchAoConfig


# The two towers with a decoder and without, and the other two forms: the linear layers of other heads are alike.
each_form = pytest.mark.parametrize("case", [*CASES[:2], *CASES[-2:]], ids=str)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchao") is not None, reason="the tests of int8 run here")
def test_int8_in_an_environment_with_torchao():
    """Where torchao is installed, every import of Transformers' trainer prints warnings about it."""
    python = make_environment(ROOT / "build" / "torchao", ["torchao>=0.15"], exclude_project=False)
    printed = output_of(python, "-m", "pytest", "-n", "0", "-k", "int8_is_close", __file__)
    assert re.search(r"\b4 passed\b", printed)
    assert "skipped" not in printed


@pytest.mark.skipif(find_spec("torchao") is None, reason="runs in an environment of its own")
@each_form
@torch.no_grad()
def test_int8_is_close_and_its_checkpoint_is_smaller_and_gives_the_same(case, tmp_path):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    model = case.make_model()
    model.save_pretrained(tmp_path / "float32")
    quantization_config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    quantized = case.model_class.from_pretrained(tmp_path / "float32", quantization_config=quantization_config)
    outputs = quantized(**case.make_inputs())
    expected = model(**case.make_inputs())
    error = main_output(outputs) - main_output(expected)
    assert 0 < error.square().mean().sqrt() < 0.3 * main_output(expected).std()
    assert share_of_kept(outputs, expected) > 0.95
    quantized.save_pretrained(tmp_path / "int8")
    size = (tmp_path / "int8/model.safetensors").stat().st_size
    size_before = (tmp_path / "float32/model.safetensors").stat().st_size
    assert size < 0.7 * size_before  # embeddings, norms and biases keep their four bytes
    assert_same_outputs(case.model_class.from_pretrained(tmp_path / "int8"), quantized, case)


@each_form
def test_adapters_alone_are_trained_and_give_the_same_saved_loaded_and_merged(case, tmp_path):
    base = case.make_model()
    tied = [name.removesuffix(".weight") for name in base.all_tied_weights_keys]  # merging would change both
    lora_config = LoraConfig(r=4, target_modules="all-linear", exclude_modules=tied)
    adapted = get_peft_model(base, lora_config).train()
    frozen = {name: tensor.clone() for name, tensor in adapted.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = loss_of(adapted(**case.make_inputs(training=True)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    state = adapted.eval().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in frozen.items())
    assert all(state[name].norm() > 0 for name in state if "lora_B" in name)  # they began as zeros

    model = case.make_model()
    if case is CASES[0]:
        assert kept_by(adapted(**case.make_inputs())) != kept_by(model(**case.make_inputs()))  # they select patches
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model, tmp_path).eval()
    assert_same_outputs(loaded, adapted, case)
    assert_same_outputs(loaded.merge_and_unload(), adapted, case, rtol=1e-4, atol=1e-5)
