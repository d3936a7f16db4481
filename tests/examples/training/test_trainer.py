"""Transformers' `Trainer` on plain rows, and the parameters that data parallel training freezes."""

import pytest
import torch
from tiny_models import each_model, loss_of
from transformers import Trainer, TrainingArguments

from trips_examples.training.trainer import unused_parameters


@each_model
def test_a_trainer_evaluates_the_loss(case, tmp_path):
    """Rows hold only the model's inputs."""
    if "labels" not in case.training_inputs:
        pytest.skip("no labels")
    inputs = case.make_inputs(training=True)
    rows = [{name: tensor[row] for name, tensor in inputs.items()} for row in range(4)]
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    metrics = Trainer(case.make_model(), args, eval_dataset=rows).evaluate()
    torch.manual_seed(0)
    expected = case.make_model()(**inputs).loss
    assert case.draws or metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["eval_loss"] > 0


SELECTIONS = [{}, {"keep_rate": 1.0}, {"selection_guidance": "image"}, {"selection_guidance": "random"}]
SELECTIONS += [{"selection_layers": []}, {"fuse_inattentive_tokens": False}]


@each_model
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_with_the_unused_parameters_frozen_every_parameter_has_a_gradient(case, selection):
    """Otherwise data parallel training would wait for their gradients."""
    model = case.make_model(**selection).train()
    unused = unused_parameters(model)
    projection = getattr(model, "model", model).vision_model.selection_projection
    assert len(unused) == (2 if selection and projection is not None else 0)
    for parameter in unused:
        parameter.requires_grad_(False)
    loss_of(model(**case.make_inputs(training=True))).backward()
    missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    if not selection:
        missing += [name for name, value in model.named_parameters() if not value.grad.any()]
    assert missing == [] and all(parameter.grad is None for parameter in unused)
