"""Results of a text do not depend on padding, other rows or their order, nor on texts that share its image."""

from inspect import signature

import pytest
import torch
from tiny_models import CASES, each_model, gradients_of, kept_by, loss_of, main_output

from modeling_trips import TripsForImagesAndTextClassification


BY_TOKEN = ("input_ids", "attention_mask", "mlm_input_ids", "mlm_labels")


def without_padding(outputs, inputs) -> torch.Tensor:
    main = main_output(outputs)
    return main[inputs["attention_mask"] == 1] if "last_hidden_state" in outputs else main


# ---------------------------------------------------------------------------------------------------------------------
# The side of padding


def padded_on_the_left(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    shifts = (inputs["attention_mask"] == 0).sum(dim=-1).tolist()
    assert len({*shifts}) > 1
    rolled = {
        name: torch.stack([row.roll(shift) for row, shift in zip(inputs[name], shifts)])
        for name in BY_TOKEN
        if name in inputs
    }
    return {**inputs, **rolled}


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


# ---------------------------------------------------------------------------------------------------------------------
# Other rows


@pytest.mark.parametrize("case", [case for case in CASES if not case.draws], ids=str)
@torch.no_grad()
def test_padding_batch_and_order_change_nothing_for_a_text(case):
    model, inputs, order = case.make_model(), case.make_inputs(6), torch.tensor([4, 2, 0, 5, 1, 3])
    together = model(**inputs)
    images_per_text = len(together.selection[0].kept_indices) // 6
    shuffled = {name: tensor[order] for name, tensor in inputs.items()}
    shuffled |= {name: torch.nn.functional.pad(shuffled[name], (0, 4)) for name in ("input_ids", "attention_mask")}
    outputs = model(**shuffled)
    for place, row in enumerate(order.tolist()):
        length = int(inputs["attention_mask"][row].sum())
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        alone |= {name: alone[name][:, :length] for name in ("input_ids", "attention_mask")}
        alone = model(**alone)
        (expected,) = main_output(alone)
        for states, at in ((main_output(together), row), (main_output(outputs), place)):
            torch.testing.assert_close(states[at][: len(expected)], expected, rtol=1e-4, atol=1e-5)
        for layer, layer_shuffled, layer_alone in zip(kept_by(together), kept_by(outputs), kept_by(alone)):
            assert layer[row * images_per_text : (row + 1) * images_per_text] == layer_alone
            assert layer_shuffled[place * images_per_text : (place + 1) * images_per_text] == layer_alone


# ---------------------------------------------------------------------------------------------------------------------
# Shared images


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if not case.draws and "image_cache" in signature(case.model_class.forward).parameters],
    ids=str,
)
@pytest.mark.parametrize("as_cache", [False, True], ids=["pixels", "image_cache"])
@pytest.mark.parametrize(
    "selection",
    [{}, {"selection_guidance": "image"}, {"selection_guidance": ["image", "text"]}, {"keep_rate": 1.0}],
    ids=str,
)
def test_shared_images_and_image_caches_equal_repeated_images(case, selection, as_cache):
    index = torch.tensor([1, 0, 1, 1])
    if case.model_class is TripsForImagesAndTextClassification:
        index = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 0]])
    results = []
    for shared in (True, False):
        model, inputs = case.make_model(**selection).double(), case.make_inputs(training=True)
        pixel_values = inputs.pop("pixel_values").flatten(0, -4)[:2].double().requires_grad_()
        if not shared:
            images = {"pixel_values": pixel_values[index]}
        elif as_cache:
            images = {"image_cache": model.base_model.encode_images(pixel_values), "image_index": index}
        else:
            images = {"pixel_values": pixel_values, "image_index": index}
        outputs = model(**inputs, **images)
        loss_of(outputs).backward()
        results.append((outputs, pixel_values.grad, gradients_of(model)))
    (outputs, *gradients), (expected, *expected_gradients) = results
    torch.testing.assert_close(main_output(outputs), main_output(expected), rtol=1e-5, atol=1e-5)
    assert kept_by(outputs) == kept_by(expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
