"""Passes in training teach the scores which patches the loss needs."""

import math

import pytest
import torch
from tiny_models import CASES, enable_checkpointing, gradients_of

from modeling_trips import UNPRUNED, SelectionSchedule, TripsModel
from modeling_trips.modeling_trips_vision import TripsSelection, scores_of_tokens
from modeling_trips.patch_selection import RelevanceGradient


MODEL, QUESTIONS = CASES[:2]
SCORED = {"schedule": SelectionSchedule.parse("1:text:score")}
FIELDS = {"schedule": "1:text:0.5"}


def shared_inputs():
    """Return four texts about two images."""
    inputs = MODEL.make_inputs()
    return {**inputs, "pixel_values": inputs["pixel_values"][:2], "image_index": torch.tensor([0, 1, 1, 0])}


def run_with_states(model, **inputs):
    """Return the outputs, and the states of images that the text reads."""
    read = []
    hook = model.fusion_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    outputs = model(**inputs)
    hook.remove()
    (states,) = read
    return outputs, states


def targets_of(gradient, states):
    relevance = (-gradient * states).sum(dim=-1)[:, 1:].clamp(min=0).detach()
    return relevance / relevance.sum(dim=-1, keepdim=True).clamp(min=1e-30)


def outputs_in_training(model, inputs, **kwargs):
    with torch.no_grad():
        return model.train()(**inputs, **kwargs)


def test_a_head_reads_the_image_states_that_teach():
    outputs, states = run_with_states(MODEL.make_model().train(), **shared_inputs(), **SCORED)
    assert outputs.vision_model_output.last_hidden_state is states


def test_the_scores_learn_from_the_relevance_of_the_candidates():
    """By hand: -g . h is 3, 1, and -2, which counts as 0; so the targets are 0.75, 0.25 and 0."""
    states = torch.tensor([[[1.0, 1.0], [1.0, 2.0], [0.5, 0.0], [-1.0, 1.0]]], requires_grad=True)
    gradient = torch.tensor([[[5.0, 5.0], [-1.0, -1.0], [-2.0, 7.0], [-1.0, 1.0]]])
    scores = torch.tensor([[0.2, 0.3, 0.5]], requires_grad=True)
    values = torch.zeros(1)
    same, losses = RelevanceGradient.apply(states, scores, values)
    assert torch.equal(same, states)
    assert losses.tolist() == [0]
    (same * gradient).sum().backward(retain_graph=True)
    assert torch.equal(states.grad, gradient)
    assert scores.grad is None  # no loss of its own, nothing to learn
    scores.grad = None
    ((same * gradient).sum() + 2 * losses.sum()).backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[-2 * 0.75 / 0.2, -2 * 0.25 / 0.3, 0.0]]))
    assert values.item() == pytest.approx(-0.75 * math.log(0.2) - 0.25 * math.log(0.3))


def test_a_text_without_relevant_candidates_teaches_nothing():
    states = torch.ones(1, 3, 2, requires_grad=True)
    scores = torch.tensor([[0.4, 0.6]], requires_grad=True)
    same, losses = RelevanceGradient.apply(states, scores, torch.zeros(1))
    (same.sum() + losses.sum()).backward()
    assert scores.grad.tolist() == [[0, 0]]


@pytest.mark.parametrize("fusion_type", ["cross_attention", "skip_connected"])
@pytest.mark.parametrize("schedule", ["1:text:score", "1:image:score", "1:image:score,2:text:score"])
def test_gradients_are_those_of_the_cross_entropy_with_the_relevance(schedule, fusion_type):
    """
    Where a text scores, the relevance is that for its own loss; where the image does, that for those of all its texts.
    """
    inputs = shared_inputs()
    model = MODEL.make_model("eager", **FIELDS, fusion_type=fusion_type).train()
    schedule = SelectionSchedule.parse(schedule)

    def other_losses(last_hidden_state: torch.Tensor) -> torch.Tensor:
        return last_hidden_state.square().sum(dim=(1, 2)) * torch.arange(1, 5)

    repeated = {**inputs, "pixel_values": inputs["pixel_values"][inputs["image_index"]]}
    del repeated["image_index"]
    unpruned, states = run_with_states(model, **repeated, schedule=UNPRUNED)
    (gradient,) = torch.autograd.grad(other_losses(unpruned.last_hidden_state).sum(), states)
    gradient_of_image = torch.stack((gradient[0] + gradient[3], gradient[1] + gradient[2]))[inputs["image_index"]]
    loss = 0
    for number, settings in schedule.by_layer.items():
        own_gradient = gradient if settings.guidance == "text" else gradient_of_image
        targets = targets_of(own_gradient, states)
        pruned = SelectionSchedule((number,), (settings._replace(keep_rate=0.5, only_scores=False),))
        scores = model(**repeated, schedule=pruned).selection[0].scores
        loss = loss - (targets * scores.log()).sum() / len(schedule.layers)
    weights = [model.vision_model.layers[number - 1].attention.q_proj.weight for number in schedule.layers]
    expected = torch.autograd.grad(loss, weights)

    gradients = []
    for share in (0, 1):
        outputs = model(**inputs, schedule=schedule)
        losses = other_losses(outputs.last_hidden_state) + share * outputs.relevance_losses
        gradients.append(torch.autograd.grad(losses.sum(), weights))
    for without, taught, wanted in zip(*gradients, expected):
        torch.testing.assert_close(taught - without, wanted, atol=1e-5, rtol=1e-4)


def test_the_fused_token_has_the_scores_of_all_that_is_not_kept():
    """The second candidate and the second fused token of earlier layers are kept."""
    selection = TripsSelection(
        kept_indices=torch.tensor([[7, -1]]),
        scores=torch.tensor([[0.1, 0.3, 0.2, 0.4]]),
        candidate_indices=torch.tensor([[5, 7, -1, -1]]),
    )
    torch.testing.assert_close(scores_of_tokens(selection, num_tokens=3), torch.tensor([[0.3, 0.4, 0.3]]))
    torch.testing.assert_close(scores_of_tokens(selection, num_tokens=2), torch.tensor([[3 / 7, 4 / 7]]))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("schedule", ["1:text:0.5", "1:image:0.5", "1:image:0.5,2:text:0.5"])
def test_a_pruned_pass_teaches_its_last_layer_by_the_tokens_that_it_passes_on(schedule, fuse):
    inputs = shared_inputs()
    model = MODEL.make_model("eager", schedule=schedule, fuse_inattentive_tokens=fuse).train()
    schedule = SelectionSchedule.parse(schedule)
    weight = model.vision_model.layers[schedule.layers[-1] - 1].attention.q_proj.weight
    without, states = run_with_states(model, **inputs)
    loss = without.last_hidden_state.square().sum()
    gradient, untaught = torch.autograd.grad(loss, (states, weight), retain_graph=True)
    targets = targets_of(gradient, states)
    scores = scores_of_tokens(without.vision_model_output.selection[-1], num_tokens=targets.shape[1])
    losses = -(targets * scores.log()).sum(dim=-1)
    if schedule.selections[-1].guidance == "image":  # two texts have each image
        losses = 2 * losses
    (expected,) = torch.autograd.grad(losses.sum(), weight)

    model.config.learns_relevance = True
    outputs = model(**inputs)
    assert torch.equal(outputs.last_hidden_state, without.last_hidden_state)
    loss = outputs.last_hidden_state.square().sum() + outputs.relevance_losses.sum()
    (taught,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(taught - untaught, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_outputs_are_those_without_it_and_texts_of_an_image_share_its_row(attention):
    inputs = shared_inputs()
    model = MODEL.make_model(attention, **FIELDS)
    computed = []
    model.vision_model.register_forward_hook(lambda module, args, output: computed.append(output.last_hidden_state))
    outputs = outputs_in_training(model, inputs, **SCORED)
    expected = outputs_in_training(model, inputs, schedule=UNPRUNED)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert computed[0].shape[0] == 2
    assert outputs.relevance_losses.shape == (4,)
    assert expected.relevance_losses is None


@torch.no_grad()
def test_texts_that_share_an_image_have_a_row_each_in_every_layer_that_scores():
    schedule = SelectionSchedule.parse("1:image:score,2:text:score")
    outputs = MODEL.make_model(**FIELDS).eval()(**shared_inputs(), schedule=schedule)
    assert [layer.scores.shape[0] for layer in outputs.selection] == [4, 4]


def test_padding_changes_nothing():
    inputs = MODEL.make_inputs()
    model = MODEL.make_model(**FIELDS).train()
    padded = {name: tensor[3:4] for name, tensor in inputs.items()}  # four tokens and one of padding
    without = {**padded, "input_ids": padded["input_ids"][:, :4], "attention_mask": padded["attention_mask"][:, :4]}
    on_the_left = {name: padded[name].roll(1, dims=1) for name in ("input_ids", "attention_mask")}
    weight = model.vision_model.layers[0].attention.q_proj.weight
    outputs = model(**{**padded, **on_the_left}, **SCORED)
    (left,) = torch.autograd.grad(outputs.last_hidden_state.square().sum() + outputs.relevance_losses.sum(), weight)
    assert left.isfinite().all()
    gradients = []
    for texts in (without, padded):
        outputs = model(**texts, **SCORED)
        loss = outputs.last_hidden_state[:, :4].square().sum() + outputs.relevance_losses.sum()
        gradients.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_single_stream_is_refused():
    model = MODEL.make_model(fusion_type="single_stream")
    with pytest.raises(ValueError, match="single stream"):
        model(**MODEL.make_inputs(), **SCORED)


def test_only_what_scores_learns_from_it():
    """Also where selection supervision by regions is off."""
    inputs = QUESTIONS.make_inputs(training=True)
    gradients = []
    for schedule in (UNPRUNED, SCORED["schedule"]):
        model = QUESTIONS.make_model(**FIELDS).train()
        model.config.selection_loss_weight = 0.0
        model(**inputs, schedule=schedule).loss.backward()
        gradients.append(gradients_of(model))
    without, taught = gradients
    for name, gradient in taught.items():
        if name.startswith(("decoder.", "lm_head.", "model.fusion_model.", "model.vision_model.layers.1.")):
            torch.testing.assert_close(gradient, without[name], msg=name)
    of_queries = "model.vision_model.layers.0.attention.q_proj.weight"
    assert not torch.allclose(taught[of_queries], without[of_queries])


HEADS = [case for case in CASES if case.model_class is not TripsModel and case.fusion_type != "single_stream"]


@pytest.mark.parametrize("case", HEADS, ids=str)
@pytest.mark.parametrize("guidance", ["text", "image"])
def test_the_scores_of_every_head_learn(case, guidance):
    """With activation checkpointing, too; in bfloat16 the gradients are near."""
    gradients = {}
    for name in ("without", "plain", "checkpointing", "bfloat16"):
        schedule = SelectionSchedule.parse("unpruned" if name == "without" else f"1:{guidance}:score")
        model = case.make_model(**FIELDS).train()
        if name == "checkpointing":
            enable_checkpointing(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
            outputs = model(**case.make_inputs(training=True), schedule=schedule)
        outputs.loss.backward()
        gradients[name] = model.base_model.vision_model.layers[0].attention.q_proj.weight.grad
        if name != "without":
            assert all((value > 0).all() for value in outputs.relevance_values)
    assert not torch.allclose(gradients["plain"], gradients["without"], rtol=0.1)
    torch.testing.assert_close(gradients["checkpointing"], gradients["plain"])
    both = torch.stack((gradients["bfloat16"], gradients["plain"])).flatten(1)
    assert torch.cosine_similarity(*both, dim=0) > 0.95
