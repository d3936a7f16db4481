"""The hot path is static: no host sync or data-dependent shape, no attention map, and one graph for each shape."""

import onnxruntime
import pytest
import torch
from tiny_models import CASES, LargestSquare, NoNumbers, compile_and_count, each_model, kept_by, loss_of, main_output
from torch.export import Dim

from modeling_trips import TripsForPreTraining
from modeling_trips.patch_selection import keep_topk


@each_model
def test_no_shape_depends_on_a_value(case):
    """Meta tensors have no values, so that a host sync or a data-dependent shape raises on them."""
    with torch.device("meta"):
        model = case.make_model().train()
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


@pytest.mark.parametrize("attn_implementation, forms_a_map", [("sdpa", False), ("eager", True)])
@torch.no_grad()
def test_no_attention_map_is_formed_with_fused_kernels(attn_implementation, forms_a_map):
    with LargestSquare(num_tokens=65) as mode:
        CASES[0].make_model(attn_implementation)(**CASES[0].make_inputs())
    assert bool(mode.found) == forms_a_map


def assert_same_outputs(outputs, expected):
    torch.testing.assert_close(main_output(outputs), main_output(expected), rtol=1e-4, atol=1e-4)
    assert kept_by(outputs) == kept_by(expected)


def batches(case):
    """Three batches of one shape."""
    for brightness in range(3):
        inputs = case.make_inputs()
        inputs["pixel_values"] += brightness
        yield inputs


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, fields",
    [
        # Pre-training is left out, because its model only returns losses.
        *((case, {}) for case in CASES if case.model_class is not TripsForPreTraining),
        (CASES[0], {"schedule": "1:image:0.6,3:image:0.6"}),
    ],
    ids=str,
)
@torch.no_grad()
def test_every_model_is_one_graph_for_all_batches_of_a_shape(case, fields):
    torch._dynamo.reset()
    model = case.make_model(**fields)
    compiled, graphs = compile_and_count(model)
    for inputs in batches(case):
        assert_same_outputs(compiled(**inputs), model(**inputs))
    assert len(graphs) == 1


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_serves_all_image_caches_of_a_schedule():
    torch._dynamo.reset()
    model = CASES[0].make_model(schedule="1:image:0.6,3:text:0.6")
    compiled, graphs = compile_and_count(model)
    for inputs in batches(CASES[0]):
        expected = model(**inputs)
        image_cache = model.encode_images(inputs.pop("pixel_values"))
        assert_same_outputs(compiled(**inputs, image_cache=image_cache), expected)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("num_kept", [1, 7, 32])
def test_of_equal_scores_the_lower_index_wins_in_onnx_too(num_kept):
    class Keep(torch.nn.Module):
        def forward(self, scores):
            return keep_topk(scores, num_kept)

    shapes = ({0: Dim("batch_size", max=64)},)
    program = torch.onnx.export(Keep().eval(), (torch.rand(2, 32),), dynamic_shapes=shapes, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    name = session.get_inputs()[0].name
    for num_levels in (1, 3, 8):
        scores = torch.randint(num_levels, (5, 32)) / 8
        (kept,) = session.run(None, {name: scores.numpy()})
        assert torch.equal(torch.from_numpy(kept), keep_topk(scores, num_kept))
