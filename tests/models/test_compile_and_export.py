"""Compilation by Inductor, `torch.export`, and export to ONNX with ONNX Runtime."""

import onnxruntime
import pytest
import torch
from tiny_models import CASES, gradients_of, kept_by, loss_of, main_output
from torch.export import Dim
from transformers import CompileConfig

from modeling_trips import TripsForPreTraining, TripsForQuestionAnswering
from modeling_trips.patch_selection import keep_topk


QUESTION_ANSWERING = next(case for case in CASES if case.model_class is TripsForQuestionAnswering)
# Pre-training is left out, because its model only returns losses.
CASES_OF_USE = [case for case in CASES if case.model_class is not TripsForPreTraining]
each_model_of_use = pytest.mark.parametrize("case", CASES_OF_USE, ids=str)
SIZES = [1, 2, 6]  # numbers of texts that differ from the one of the export


def without_cache(case) -> dict[str, bool]:
    return {"use_cache": False} if case.model_class.can_generate() else {}


def assert_same_outputs(outputs, expected):
    torch.testing.assert_close(main_output(outputs), main_output(expected), rtol=1e-4, atol=1e-4)
    assert kept_by(outputs) == kept_by(expected)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


def compile_and_count(model: torch.nn.Module) -> tuple[torch.nn.Module, list]:
    """Return the model compiled without Inductor, and the list of its graphs."""
    graphs = []

    def count_graphs(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    return torch.compile(model, backend=count_graphs, fullgraph=True), graphs


def batches(case, training=False):
    """Three batches of one shape."""
    for brightness in range(3):
        inputs = case.make_inputs(training=training)
        inputs["pixel_values"] += brightness
        yield inputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "fields"),
    [
        *((case, {}) for case in CASES_OF_USE),
        *((CASES[0], {"selection_guidance": guidance}) for guidance in ("image", ["image", "text"])),
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
def test_inductor_compiles_training_once_for_all_batches_of_a_shape():
    torch._dynamo.reset()
    model, expected = (QUESTION_ANSWERING.make_model().train() for _ in range(2))
    compiled = torch.compile(model, fullgraph=True)
    for number, inputs in enumerate(batches(QUESTION_ANSWERING, training=True)):
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            loss = loss_of(compiled(**inputs))
            loss.backward()
        loss_expected = loss_of(expected(**inputs))
        loss_expected.backward()
        torch.testing.assert_close(loss, loss_expected)
    torch.testing.assert_close(gradients_of(model), gradients_of(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_generation_with_a_static_cache_compiles_its_step_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case = QUESTION_ANSWERING
    model = case.make_model()
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True  # `generate` leaves CPUs out otherwise
    length = {"min_new_tokens": 6, "max_new_tokens": 6}
    for number, inputs in enumerate(batches(case)):
        inputs = {name: tensor for name, tensor in inputs.items() if name not in case.inputs}
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            sequences = model.generate(
                **inputs, **length, cache_implementation="static", compile_config=compile_config
            )
        assert torch.equal(sequences, model.generate(**inputs, **length))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# torch.export


def dynamic_shapes(inputs: dict) -> dict:
    """Return the dynamic dimensions: the number of texts, and the lengths of texts and answers."""
    texts = Dim("num_texts", max=64)
    lengths = {"decoder_input_ids": Dim("answer_length", min=2, max=16), "pixel_values": None}
    text_length = Dim("text_length", min=2, max=16)
    shapes = {}
    for name, value in inputs.items():
        length = lengths.get(name, text_length)
        axes = {0: texts} if length is None else {0: texts, 1: length}
        shapes[name] = axes if isinstance(value, torch.Tensor) else None
    return shapes


def other_inputs(case, num_texts: int) -> dict:
    """Return inputs whose sizes all differ from the defaults of `make_inputs`."""
    inputs = {**case.make_inputs(num_texts), **without_cache(case)}
    inputs["input_ids"] = inputs["input_ids"][:, :4]
    inputs["attention_mask"] = inputs["attention_mask"][:, :4]
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :2]
    return inputs


@pytest.mark.slow
@each_model_of_use
@torch.no_grad()
def test_an_exported_program_runs_at_other_sizes(case):
    model = case.make_model()
    inputs = {**case.make_inputs(), **without_cache(case)}
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic_shapes(inputs), strict=False).module()
    for num_texts in SIZES:
        inputs = other_inputs(case, num_texts)
        assert_same_outputs(program(**inputs), model(**inputs))


@torch.no_grad()
def test_an_exported_program_takes_any_number_of_texts_about_any_number_of_images():
    case = CASES[0]
    model, texts, images = case.make_model("eager"), Dim("num_texts", max=64), Dim("num_images", max=64)
    shapes = {name: {0: texts} for name in ("input_ids", "attention_mask", "image_index")}
    shapes["pixel_values"] = {0: images}

    def inputs_of(image_index):
        inputs = {**case.make_inputs(len(image_index)), "image_index": torch.tensor(image_index)}
        return {**inputs, "pixel_values": inputs["pixel_values"][: max(image_index) + 1]}

    program = torch.export.export(model, (), inputs_of([1, 0, 1, 2]), dynamic_shapes=shapes, strict=False).module()
    for image_index in ([1, 0], [0, 1, 1, 0, 1]):
        inputs = inputs_of(image_index)
        assert_same_outputs(program(**inputs), model(**inputs))


# ---------------------------------------------------------------------------------------------------------------------
# ONNX


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
