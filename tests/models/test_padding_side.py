"""Left and right padding of texts give the same patches, logits and losses."""

import pytest
import torch
from tiny_models import Case, each_model, kept_by, loss_of, main_output
from tiny_processors import make_processor

from modeling_trips import TripsModel


BY_TOKEN = ("input_ids", "attention_mask", "mlm_input_ids", "mlm_labels")


def padded_on_the_left(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    shifts = (inputs["attention_mask"] == 0).sum(dim=-1).tolist()
    assert len({*shifts}) > 1
    rolled = {
        name: torch.stack([row.roll(shift) for row, shift in zip(inputs[name], shifts)])
        for name in BY_TOKEN
        if name in inputs
    }
    return {**inputs, **rolled}


def without_padding(outputs, inputs) -> torch.Tensor:
    main = main_output(outputs)
    return main[inputs["attention_mask"] == 1] if "last_hidden_state" in outputs else main


@each_model
@pytest.mark.parametrize("training", [False, True], ids=["inference", "losses"])
@torch.no_grad()
def test_the_side_of_padding_changes_nothing(case, training):
    if training and not case.training_inputs:
        pytest.skip("no losses")
    model, results = case.make_model(), []
    for pad in (lambda inputs: inputs, padded_on_the_left):
        inputs = pad(case.make_inputs(training=training))
        outputs = model(**inputs)
        loss = loss_of(outputs) if training else torch.zeros(())
        results.append((without_padding(outputs, inputs), kept_by(outputs), loss))
    (right, kept, loss), (left, kept_left, loss_left) = results
    assert kept_left == kept
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss_left, loss, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_attention_of_the_class_token_is_that_of_each_text():
    model, looks = Case(TripsModel).make_model(), []
    for pad in (lambda inputs: inputs, padded_on_the_left):
        inputs = pad(Case(TripsModel).make_inputs())
        looks.append(model(**inputs, output_cls_attention=True).cls_attention)
    torch.testing.assert_close(looks[1], looks[0], rtol=0, atol=1e-5)


def test_a_processor_that_pads_on_the_left_makes_the_same_tokens():
    texts = ["what is this", "cat"]
    left, right = (make_processor(padding_side=side)(text=texts, return_tensors="pt") for side in ("left", "right"))
    assert left["attention_mask"][1].tolist() == right["attention_mask"][1].flip(0).tolist()
    rolled = padded_on_the_left(dict(right))
    assert all(torch.equal(left[name], rolled[name]) for name in ("input_ids", "attention_mask"))
