"""int8 by torchao and LoRA adapters by PEFT, which replace the linear layers of selection."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import (
    CASES,
    each_model,
    kept_by,
    loss_of,
    main_output,
    share_of_kept,
)
from torchao.quantization import Int8DynamicActivationInt8WeightConfig
from torchao.utils import TorchAOBaseTensor
from transformers import TorchAoConfig


def assert_same_outputs(model, expected, case, **tolerance):
    outputs, expected = model(**case.make_inputs()), expected(**case.make_inputs())
    torch.testing.assert_close(main_output(outputs), main_output(expected), **tolerance)
    assert kept_by(outputs) == kept_by(expected)


def load_int8(case, folder):
    """Load a model with int8 weights and dynamic int8 activations."""
    quantization_config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    return case.model_class.from_pretrained(folder, quantization_config=quantization_config)


@each_model
@torch.no_grad()
def test_int8_is_close_and_keeps_nearly_the_same_patches(case, tmp_path):
    model = case.make_model()
    model.save_pretrained(tmp_path)
    quantized = load_int8(case, tmp_path)
    linear = {name: module for name, module in quantized.named_modules() if isinstance(module, torch.nn.Linear)}
    left = {name for name, module in linear.items() if not isinstance(module.weight, TorchAOBaseTensor)}
    assert left == {name.removesuffix(".weight") for name in model.all_tied_weights_keys}  # tied to embeddings
    outputs, expected = quantized(**case.make_inputs()), model(**case.make_inputs())
    error = main_output(outputs) - main_output(expected)
    assert 0 < error.square().mean().sqrt() < 0.3 * main_output(expected).std()
    assert share_of_kept(outputs, expected) > 0.95


@each_model
@torch.no_grad()
def test_an_int8_checkpoint_is_smaller_and_gives_the_same(case, tmp_path):
    case.make_model().save_pretrained(tmp_path / "float32")
    quantized = load_int8(case, tmp_path / "float32")
    quantized.save_pretrained(tmp_path / "int8")
    size, size_before = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("int8", "float32"))
    assert size < 0.7 * size_before  # embeddings, norms and biases keep their four bytes
    assert_same_outputs(case.model_class.from_pretrained(tmp_path / "int8"), quantized, case, rtol=0, atol=0)


VISION = ["q_proj", "v_proj"]
TEXT = ["query", "value"]
EVERYTHING = "all-linear"
each_target = pytest.mark.parametrize("targets", [VISION, TEXT, EVERYTHING], ids=["vision", "text", "everything"])


def make_adapted(case, targets, **options) -> PeftModel:
    modules_to_save = options.pop("modules_to_save", None)
    model = case.make_model(**options)
    tied = [name.removesuffix(".weight") for name in model.all_tied_weights_keys]  # merging would change both
    config = LoraConfig(
        r=4,
        target_modules=targets,
        modules_to_save=modules_to_save,
        exclude_modules=tied if targets == EVERYTHING else None,
    )
    return get_peft_model(model, config)


def train(model: torch.nn.Module, case, num_steps: int = 20) -> list[float]:
    """Train on one batch and return the losses."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(num_steps):
        loss = loss_of(model(**case.make_inputs(training=True)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@each_model
@each_target
def test_only_the_adapters_are_trained(case, targets):
    adapted = make_adapted(case, targets)
    frozen = {name: tensor.clone() for name, tensor in adapted.state_dict().items() if "lora_" not in name}
    losses = train(adapted, case)
    assert losses[-1] < losses[0] - 0.1
    state = adapted.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in frozen.items())
    assert all(state[name].norm() > 0 for name in state if "lora_B" in name)  # they began as zeros


@each_model
@each_target
@torch.no_grad()
def test_saved_loaded_and_merged_adapters_give_the_same(case, targets, tmp_path):
    adapted = make_adapted(case, targets)
    with torch.enable_grad():
        train(adapted, case, num_steps=5)
    base = case.make_model()
    if case is CASES[0]:
        assert kept_by(adapted(**case.make_inputs())) != kept_by(base(**case.make_inputs()))  # they select patches
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_same_outputs(loaded, adapted, case, rtol=0, atol=0)

    merged = loaded.merge_and_unload()
    assert_same_outputs(merged, adapted, case, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again, report = case.model_class.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values())
    assert_same_outputs(again, merged, case, rtol=0, atol=0)
