"""Unpruned training passes teach the scores where the fusion encoder looks."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny_models import CASES, gradients_of, make_config

from modeling_trips import UNPRUNED, SelectionSchedule, TripsConfig, TripsModel
from modeling_trips.patch_selection import imitation_loss, squared_attention


MODEL = next(case for case in CASES if case.model_class is TripsModel)
QUESTIONS = next(case for case in CASES if case.model_class.__name__ == "TripsForQuestionAnswering")
SCHEDULE = SelectionSchedule.parse("1:text:0.5")
FIELDS = SCHEDULE.config_fields


def make_model(case=MODEL, attention="sdpa", imitates=True, **fields):
    return case.make_model(attention, **{**FIELDS, "selection_imitation": imitates, **fields})


def unpruned_outputs(model, inputs, **kwargs):
    with torch.no_grad():
        return model.train()(**inputs, schedule=UNPRUNED, **kwargs)


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
    model = make_model(attention="eager")
    outputs = unpruned_outputs(model, inputs, output_attentions=True)
    scores = model(**inputs).selection[0].scores  # batch normalisation as in training
    of_cls = outputs.cross_attentions[-1][:, :, 0, 1:]  # (num_texts, num_heads, num_patches)
    expected = imitation_loss(scores, of_cls.square().mean(dim=1))
    torch.testing.assert_close(outputs.selection_losses, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_outputs_are_those_without_it_and_texts_of_an_image_share_its_row(attention):
    inputs = MODEL.make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"][:2]
    inputs["image_index"] = torch.tensor([0, 1, 1, 0])
    outputs = unpruned_outputs(make_model(attention=attention), inputs)
    expected = unpruned_outputs(make_model(attention=attention, imitates=False), inputs)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert outputs.vision_model_output.last_hidden_state.shape[0] == 2
    assert outputs.selection_losses.shape == (4,)
    assert expected.selection_losses is None
    inputs["pixel_values"] = inputs["pixel_values"][inputs.pop("image_index")]
    repeated = unpruned_outputs(make_model(attention=attention), inputs)
    torch.testing.assert_close(outputs.selection_losses, repeated.selection_losses)


def test_padding_on_the_left_changes_nothing():
    inputs = MODEL.make_inputs()
    model = make_model()
    one = {name: tensor[3:4] for name, tensor in inputs.items()}  # of four tokens
    without = {**one, "input_ids": one["input_ids"][:, :4], "attention_mask": one["attention_mask"][:, :4]}
    right = unpruned_outputs(model, one)
    torch.testing.assert_close(unpruned_outputs(model, without).selection_losses, right.selection_losses)


def test_only_what_scores_learns_from_it():
    inputs = QUESTIONS.make_inputs(training=True)
    gradients = {}
    for weight in (0.0, 1.0):
        model = make_model(QUESTIONS).train()
        model.config.selection_loss_weight = weight
        outputs = model(**inputs, schedule=UNPRUNED)
        outputs.loss.backward()
        gradients[weight] = gradients_of(model)
    assert outputs.selection_loss > 0
    changed = set()
    for name, gradient in gradients[1.0].items():
        if not torch.allclose(gradient, gradients[0.0][name], atol=1e-7):
            changed.add(name.removeprefix("model.vision_model.").rpartition(".")[0])
    assert changed == {"selection_projection", "layers.0.attention.q_proj"}


def test_a_projection_that_imitation_adds_begins_as_if_it_was_not_there():
    fields = {"hidden_size": 48, "num_attention_heads": 4}  # as wide as the text
    inputs = MODEL.make_inputs()
    without = make_model(imitates=False, **fields)
    model = make_model(**fields)
    report = model.load_state_dict(without.state_dict(), strict=False)
    assert all("selection_projection" in name for name in report.missing_keys) and report.missing_keys
    assert torch.equal(model(**inputs).last_hidden_state, without(**inputs).last_hidden_state)


def test_pruned_passes_and_evaluation_have_no_such_loss():
    inputs = MODEL.make_inputs()
    model = make_model()
    assert model.train()(**inputs).selection_losses is None
    assert model.eval()(**inputs, schedule=UNPRUNED).selection_losses is None


def test_a_schedule_without_text_has_none():
    model = make_model(**SelectionSchedule.parse("1:image:0.5").config_fields)
    assert unpruned_outputs(model, MODEL.make_inputs()).selection_losses is None


@pytest.mark.parametrize("fusion_type", ["skip_connected", "single_stream"])
def test_a_fusion_without_cross_attention_is_refused(fusion_type):
    config = make_config(fusion_type=fusion_type)
    with pytest.raises(StrictDataclassClassValidationError, match="selection_imitation"):
        TripsConfig.from_dict({**config.to_dict(), "selection_imitation": True})
