"""
Train every model of `tiny_models.CASES` in two processes that share a batch, and compare the weights with those of
one process. If losses draw from the batch, check that all weights were trained. `accelerate launch` starts this
script, which prints the classes of the wrapped models.
"""

import torch
from accelerate import Accelerator
from tiny_models import CASES, loss_of
from torch.distributed.tensor import DTensor


def train(model, optimizer, inputs, accelerator=None):
    for _ in range(3):
        loss = loss_of(model(**inputs))
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def compare(case, accelerator, **fields):
    if accelerator.is_fsdp2 and case.fusion_type == "single_stream":  # as examples/configs/fsdp2.yaml says
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = ["TripsVisionLayer", "TripsCrossLayer"]
    # No BatchNorm, whose statistics differ between processes. Both halves of the batch have the same number of labels.
    fields["patch_embedding_type"] = "linear"
    model, expected = (case.make_model(**fields).train() for _ in range(2))
    inputs = case.make_inputs(4, training=True)
    half = slice(2 * accelerator.process_index, 2 * accelerator.process_index + 2)
    train(expected, torch.optim.SGD(expected.parameters(), lr=0.1), inputs)

    prepared = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    train(*prepared, {name: tensor[half] for name, tensor in inputs.items()}, accelerator)
    weights = dict(accelerator.unwrap_model(prepared[0]).named_parameters())
    start = case.make_model(**fields).state_dict()
    for name, weight_expected in expected.named_parameters():
        weight = weights[name].full_tensor() if isinstance(weights[name], DTensor) else weights[name]
        if case.draws:
            assert weight.isfinite().all() and not torch.equal(weight, start[name]), name
        else:
            torch.testing.assert_close(weight, weight_expected, rtol=1e-4, atol=1e-5, msg=name)
    accelerator.print(type(prepared[0]).__name__, flush=True)
    accelerator.free_memory()


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    for case in CASES:
        compare(case, accelerator)
    accelerator.end_training()
