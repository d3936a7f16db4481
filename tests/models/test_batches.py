"""Results of a text do not depend on padding, other rows or their order, nor on texts that share its image."""

from inspect import signature

import pytest
import torch
from tiny_models import CASES, each_model, gradients_of, kept_by, loss_of, main_output
from torch.testing import assert_close

from modeling_trips import TripsForImagesAndTextClassification


BY_TOKEN = {"input_ids", "attention_mask", "mlm_input_ids", "mlm_labels"}


def without_padding(outputs, inputs):
    main = main_output(outputs)
    return main[inputs["attention_mask"] == 1] if "last_hidden_state" in outputs else main


# ---------------------------------------------------------------------------------------------------------------------
# The side of padding


def padded_on_the_left(inputs):
    shifts = (inputs["attention_mask"] == 0).sum(dim=-1).tolist()
    assert len(set(shifts)) > 1
    inputs = dict(inputs)
    for name in BY_TOKEN & inputs.keys():
        inputs[name] = torch.stack([row.roll(shift) for row, shift in zip(inputs[name], shifts)])
    return inputs


@each_model
@pytest.mark.parametrize("training", [False, True], ids=["inference", "losses"])
@torch.no_grad()
def test_the_side_of_padding_changes_nothing(case, training):
    if training and not case.training_inputs:
        pytest.skip("no losses")
    model = case.make_model()
    inputs = case.make_inputs(training=training)
    expected = model(**inputs)
    torch.manual_seed(0)
    left = padded_on_the_left(inputs)
    outputs = model(**left)
    assert kept_by(outputs) == kept_by(expected)
    states = without_padding(outputs, left)
    assert_close(states, without_padding(expected, inputs), rtol=0, atol=1e-5)
    if training:
        assert_close(loss_of(outputs), loss_of(expected), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Other rows


@pytest.mark.parametrize("case", [case for case in CASES if not case.draws], ids=str)
@torch.no_grad()
def test_padding_batch_and_order_change_nothing_for_a_text(case):
    model = case.make_model()
    inputs = case.make_inputs(6)
    together = model(**inputs)
    order = [4, 2, 0, 5, 1, 3]
    shuffled = {name: tensor[order] for name, tensor in inputs.items()}
    for name in ("input_ids", "attention_mask"):
        shuffled[name] = torch.nn.functional.pad(shuffled[name], (0, 4))
    shuffled = model(**shuffled)
    images_per_text = len(together.selection[0].kept_indices) // 6

    def check(outputs, row, alone):
        """Check that the results of a row of a batch are those of the same text alone."""
        (expected,) = main_output(alone)
        states = main_output(outputs)[row]
        assert_close(states[: len(expected)], expected, rtol=1e-4, atol=1e-5)
        images = slice(row * images_per_text, (row + 1) * images_per_text)
        assert [layer[images] for layer in kept_by(outputs)] == kept_by(alone)

    for place, row in enumerate(order):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        length = int(one["attention_mask"].sum())
        for name in ("input_ids", "attention_mask"):
            one[name] = one[name][:, :length]
        alone = model(**one)
        check(together, row, alone)
        check(shuffled, place, alone)


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
    [{}, *({"schedule": text} for text in ("1:image:0.6,3:image:0.6", "1:image:0.6,3:text:0.6", "unpruned"))],
    ids=str,
)
def test_shared_images_and_image_caches_equal_repeated_images(case, selection, as_cache):
    index = torch.tensor([1, 0, 1, 1])
    if case.model_class is TripsForImagesAndTextClassification:
        index = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 0]])

    def run(shared):
        """Return the outputs, and the gradients of the pixels and of the model."""
        model = case.make_model(**selection).double()
        inputs = case.make_inputs(training=True)
        pixel_values = inputs.pop("pixel_values").flatten(0, -4)[:2].double().requires_grad_()
        if not shared:
            images = {"pixel_values": pixel_values[index]}
        elif as_cache:
            images = {"image_cache": model.base_model.encode_images(pixel_values), "image_index": index}
        else:
            images = {"pixel_values": pixel_values, "image_index": index}
        outputs = model(**inputs, **images)
        loss_of(outputs).backward()
        return outputs, {**gradients_of(model), "pixel_values": pixel_values.grad}

    outputs, gradients = run(shared=True)
    expected, expected_gradients = run(shared=False)
    assert_close(main_output(outputs), main_output(expected), rtol=1e-5, atol=1e-5)
    assert kept_by(outputs) == kept_by(expected)
    assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
