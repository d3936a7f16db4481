"""The model's hot path is static: no recompilation, no host syncs, no full attention map."""

import pytest
import torch
from tiny_models import LargestSquare, NoNumbers, each_model, loss_of

from modeling_trips import TripsConfig, TripsModel


def make_model(**options) -> TripsModel:
    config = TripsConfig.from_preset("tiny", selection_layers=[1, 3], keep_rate=0.6, **options)
    return TripsModel(config).eval()


def make_inputs(num_texts: int = 4, num_images: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(5, 128, (num_texts, 6), generator=generator),
        "pixel_values": torch.randn(num_images, 3, 64, 64, generator=generator),
        "image_index": torch.randint(num_images, (num_texts,), generator=generator),
    }


@torch.no_grad()
def test_one_graph_serves_all_image_caches_of_a_schedule():
    torch._dynamo.reset()
    model = make_model(selection_guidance=["image", "text"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for seed in range(3):
        inputs = make_inputs(seed=seed)
        expected = model(**inputs).last_hidden_state
        image_cache = model.encode_images(inputs.pop("pixel_values"))
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            actual = compiled(**inputs, image_cache=image_cache).last_hidden_state
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@each_model
@pytest.mark.parametrize("guidance", ["text", "image", ["image", "text"]], ids=str)
def test_no_shape_depends_on_a_value(case, guidance):
    """Meta tensors have no values, so that a host sync or a data-dependent shape raises on them."""
    with torch.device("meta"):
        model = case.make_model(selection_guidance=guidance).train()
    inputs = case.make_inputs(training=True)
    for name in ("attention_mask", "prompt_attention_mask"):  # the library looks at their values
        inputs.pop(name, None)
    outputs = model(**{name: tensor.to("meta") for name, tensor in inputs.items()})
    loss_of(outputs).backward()
    assert [layer.kept_indices.shape[1] for layer in outputs.selection] == [39, 24]


@each_model
def test_nothing_waits_for_the_device(case):
    """The test covers padded texts and training with the backward pass."""
    model, inputs = case.make_model().train(), case.make_inputs(training=True)
    assert not inputs["attention_mask"].all()
    with NoNumbers():
        loss_of(model(**inputs)).backward()


@pytest.mark.parametrize(("attn_implementation", "forms_a_map"), [("sdpa", False), ("eager", True)])
def test_no_attention_map_is_formed_with_fused_kernels(attn_implementation, forms_a_map):
    model = make_model()
    model.set_attn_implementation(attn_implementation)
    with torch.no_grad(), LargestSquare(num_tokens=65) as mode:
        model(**make_inputs())
    assert bool(mode.found) == forms_a_map
