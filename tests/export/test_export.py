"""Exported models: outputs, answers and kept patches of PyTorch, at other sizes than they were traced with."""

import pytest
import torch
from tiny_models import CASES, kept_by, main_output

from modeling_trips import TripsForPreTraining
from modeling_trips.export import export_model, load_exported


SIZES = [1, 2, 6]
each_model_of_use = pytest.mark.parametrize(
    "case", [case for case in CASES if case.model_class is not TripsForPreTraining], ids=str
)


def other_inputs(case, num_texts):
    inputs = case.make_inputs(num_texts)
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:, :4], inputs["attention_mask"][:, :4]
    return inputs


@pytest.mark.slow
@each_model_of_use
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
@pytest.mark.parametrize("mode", ["topk", "mass"])
@torch.no_grad()
def test_every_model_gives_the_same_outputs_and_patches(case, backend, mode, tmp_path):
    model = case.make_model(selection_mode=mode, selection_mass=0.5)
    export_model(model, tmp_path, backend)
    exported = load_exported(tmp_path)
    assert type(exported).__name__.removeprefix("TripsGraph") in (type(model).__name__, "Model")
    for num_texts in SIZES:
        inputs = other_inputs(case, num_texts)
        outputs, expected = exported(**inputs), model(**inputs)
        torch.testing.assert_close(main_output(outputs), main_output(expected), rtol=1e-4, atol=1e-4)
        assert kept_by(outputs) == kept_by(expected)
