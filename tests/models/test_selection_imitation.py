"""Unpruned passes in training teach the scores where the fusion encoder looks."""

import pytest
import torch
from tiny_models import CASES, gradients_of

from modeling_trips import UNPRUNED, SelectionSchedule, TripsModel
from modeling_trips.patch_selection import imitation_loss, squared_attention


MODEL = next(case for case in CASES if case.model_class is TripsModel)
QUESTIONS = next(case for case in CASES if case.model_class.__name__ == "TripsForQuestionAnswering")
SCORED = {"schedule": UNPRUNED, "scored_layers": (1,)}
FIELDS = SelectionSchedule.parse("1:text:0.5").config_fields


def outputs_in_training(model, inputs, **kwargs):
    with torch.no_grad():
        return model.train()(**inputs, **kwargs)


def test_a_head_that_looks_at_one_place_counts_most():
    query = torch.tensor([[[[4.0]], [[0.0]]]])  # (1, 2 heads, 1 query, 1)
    key = torch.tensor([[[[1.0], [-1.0]], [[1.0], [-1.0]]]])
    first_head = torch.tensor([4.0, -4.0]).softmax(dim=0)
    second_head = torch.tensor([0.5, 0.5])
    expected = (first_head**2 + second_head**2) / 2
    torch.testing.assert_close(squared_attention(query, key, scaling=1.0)[0, 0], expected)


def test_the_loss_is_zero_where_scores_equal_the_attention():
    attention = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    equal = torch.tensor([[0.75, 0.25], [1e-12, 1.0]])
    torch.testing.assert_close(imitation_loss(equal, attention), torch.zeros(2), atol=1e-6, rtol=0)
    even = imitation_loss(torch.full((2, 2), 0.5), attention)
    by_hand = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    torch.testing.assert_close(even[0], by_hand)
    torch.testing.assert_close(even[1], torch.tensor(2.0).log())


def test_the_loss_compares_the_pruned_model_s_scores_with_the_attention_of_the_text_s_cls():
    inputs = MODEL.make_inputs()
    model = MODEL.make_model("eager", **FIELDS)
    outputs = outputs_in_training(model, inputs, **SCORED, output_attentions=True)
    scores = outputs_in_training(model, inputs).selection[0].scores
    of_cls = outputs.cross_attentions[-1][:, :, 0, 1:]  # (num_texts, num_heads, num_patches)
    expected = imitation_loss(scores, of_cls.square().mean(dim=1))
    torch.testing.assert_close(outputs.selection_losses, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_outputs_are_those_without_it_and_texts_of_an_image_share_its_row(attention):
    inputs = MODEL.make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"][:2]
    inputs["image_index"] = torch.tensor([0, 1, 1, 0])
    model = MODEL.make_model(attention, **FIELDS)
    outputs = outputs_in_training(model, inputs, **SCORED)
    expected = outputs_in_training(model, inputs, schedule=UNPRUNED)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert outputs.vision_model_output.last_hidden_state.shape[0] == 2
    assert outputs.selection_losses.shape == (4,)
    assert expected.selection_losses is None
    inputs["pixel_values"] = inputs["pixel_values"][inputs.pop("image_index")]
    repeated = outputs_in_training(model, inputs, **SCORED)
    torch.testing.assert_close(outputs.selection_losses, repeated.selection_losses)


def test_padding_changes_nothing():
    inputs = MODEL.make_inputs()
    model = MODEL.make_model(**FIELDS)
    padded = {name: tensor[3:4] for name, tensor in inputs.items()}  # four tokens and one of padding
    without = {**padded, "input_ids": padded["input_ids"][:, :4], "attention_mask": padded["attention_mask"][:, :4]}
    on_the_left = {name: padded[name].roll(1, dims=1) for name in ("input_ids", "attention_mask")}
    expected = outputs_in_training(model, without, **SCORED).selection_losses
    torch.testing.assert_close(outputs_in_training(model, padded, **SCORED).selection_losses, expected)
    left = outputs_in_training(model, {**padded, **on_the_left}, **SCORED).selection_losses
    assert left.isfinite().all()


@pytest.mark.parametrize("fusion_type", ["skip_connected", "single_stream"])
def test_other_fusions_are_refused(fusion_type):
    model = MODEL.make_model(fusion_type=fusion_type)
    with pytest.raises(ValueError, match="scored_layers"):
        model(**MODEL.make_inputs(), **SCORED)


def test_only_what_scores_learns_from_it():
    inputs = QUESTIONS.make_inputs(training=True)
    gradients = {}
    for weight in (0.0, 1.0):
        model = QUESTIONS.make_model(**FIELDS).train()
        model.config.selection_loss_weight = weight
        outputs = model(**inputs, **SCORED)
        outputs.loss.backward()
        gradients[weight] = gradients_of(model)
    assert outputs.selection_loss > 0
    for name, gradient in gradients[1.0].items():
        if name.startswith(("decoder.", "lm_head.", "model.fusion_model.", "model.vision_model.layers.1.")):
            torch.testing.assert_close(gradient, gradients[0.0][name], msg=name)
    of_queries = "model.vision_model.layers.0.attention.q_proj.weight"
    assert not torch.allclose(gradients[1.0][of_queries], gradients[0.0][of_queries])
