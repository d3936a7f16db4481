"""The gate of the selection: its value is the pruned model's, its gradient that of a loop."""

import pytest
import torch
from tiny_models import CASES, Case, enable_checkpointing, gradients_of, kept_by, loss_of

from modeling_trips import TripsModel, patch_selection
from modeling_trips.modeling_trips_vision import TripsVisionModel
from modeling_trips.patch_selection import (
    KeyInfo,
    attend,
    draw_probed,
    gate_of_best,
    gate_of_drawn,
    keep_topk,
)


QUESTIONS = next(case for case in CASES if case.model_class.__name__ == "TripsForQuestionAnswering")
each_guidance = pytest.mark.parametrize("guidance", ["text", "image"])


def loss_and_gradients(case, inputs, **fields):
    model = case.make_model(**fields).train()
    torch.manual_seed(3)
    outputs = model(**inputs)
    loss = loss_of(outputs)
    loss.backward()
    return loss.detach(), gradients_of(model), outputs


@pytest.fixture
def keeps_the_best(monkeypatch):
    """Keep the best tokens in place of drawn ones, for a comparison with models that keep the best."""
    monkeypatch.setattr(patch_selection, "draw_kept", keep_topk)


@pytest.mark.usefixtures("keeps_the_best")
@pytest.mark.parametrize("case", [case for case in CASES if not case.draws], ids=str)
@each_guidance
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_loss_is_that_of_the_pruned_model(case, guidance, attention):
    inputs = case.make_inputs(training=True)
    fields = {"attn_implementation": attention, "schedule": f"1:{guidance}:0.6,3:{guidance}:0.6"}
    expected_loss, expected_gradients, expected = loss_and_gradients(case, inputs, **fields)
    loss, gradients, outputs = loss_and_gradients(case, inputs, **fields, selection_gate=0.3)
    assert torch.equal(loss, expected_loss)
    assert kept_by(outputs) == kept_by(expected)
    # What comes after the fusion has the same gradient, the queries of the selection have another.
    assert not torch.equal(gradients_of_tower(gradients), gradients_of_tower(expected_gradients))
    for name in gradients:
        if name.startswith(("decoder.", "lm_head.", "classifier.")):
            torch.testing.assert_close(gradients[name], expected_gradients[name], msg=name)


def gradients_of_tower(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for name, value in gradients.items() if "vision_model" in name])


@pytest.mark.parametrize("additive", [False, True])
def test_the_gradient_of_the_gate_is_that_of_a_loop(additive):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 4, 3, dtype=torch.float64).unbind()  # two rows, two heads, four tokens
    query = query[:, :, :3]
    gate = torch.rand(2, 4, dtype=torch.float64).requires_grad_()
    mask = torch.ones(2, 1, 3, 4, dtype=torch.bool)
    mask[1, :, :, 0] = False
    attention_mask = mask
    if additive:
        attention_mask = torch.zeros(mask.shape).double().masked_fill(~mask, torch.finfo().min)
    scaling = 0.7
    num_kept = 3
    key_info = KeyInfo(attention_mask, gate=gate, num_probed=1)
    output, _ = attend(sdpa, torch.nn.Module(), query, key, value, key_info, scaling=scaling)
    weights = torch.randn_like(output)
    (output * weights).sum().backward()

    expected = torch.zeros_like(gate)
    for row in range(2):
        for head in range(2):
            values = value[row, head]
            for i in range(3):
                logits = scaling * key[row, head] @ query[row, head, i]
                powers = logits.exp() * mask[row, 0, i]
                kept = powers[:num_kept]
                out = kept @ values[:num_kept] / kept.sum()
                torch.testing.assert_close(output[row, i, head], out)
                for j in range(4):
                    attention = powers[j] / powers.sum()
                    expected[row, j] += attention * (weights[row, i, head] @ (values[j] - out))
    torch.testing.assert_close(gate.grad, expected)


def sdpa(module, query, key, value, attention_mask, scaling, **kwargs):
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    return output.transpose(1, 2), None


def test_the_gate_by_hand():
    # Kept are 0.4 and 0.3; the threshold is the mean of ln 0.3 and ln 0.2: the sigmoid of ln(s) - t is s / (s + e^t).
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]], requires_grad=True)
    kept = keep_topk(scores.detach(), 2)
    gate = gate_of_best(scores, kept, torch.tensor([[1, 3, 2, 0]]))
    threshold = (0.3 * 0.2) ** 0.5
    expected = torch.tensor([0.4, 0.3, 0.2, 0.1])
    torch.testing.assert_close(gate[0], expected / (expected + threshold))
    gate.sum().backward()  # the threshold is a constant: d gate / d s = t / (s + t)^2
    torch.testing.assert_close(scores.grad[0, [1, 3, 2, 0]], threshold / (expected + threshold) ** 2)


def test_the_gate_of_drawn_candidates_by_hand():
    # A quarter of the log score, for kept and dropped candidates alike: d gate / d s = 1 / (4 s).
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]], requires_grad=True)
    gate_of_drawn(scores, torch.tensor([[1, 3, 0]])).sum().backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[2.5, 0.625, 0.0, 1 / 1.2]]))


@pytest.mark.parametrize("drawn", [True, False])
def test_scores_near_zero_have_finite_gradients(drawn):
    # The attention to the second candidate is about 4e-38, the gradient that of a loss scaled for float16.
    logits = torch.tensor([[0.0, -86.0, -5.0]], requires_grad=True)
    scores = logits.softmax(dim=-1)
    positions = torch.tensor([[0, 1, 2]])
    gate = gate_of_drawn(scores, positions) if drawn else gate_of_best(scores, positions[:, :1], positions)
    (gate * 2**16).sum().backward()
    assert logits.grad.isfinite().all()


def test_dropped_candidates_are_sampled_at_random():
    torch.manual_seed(0)
    num_rows = 6000
    scores = torch.tensor([[0.3, 0.02, 0.2, 0.05, 0.4, 0.03]]).expand(num_rows, -1)
    kept = torch.tensor([[0, 2, 4]]).expand(num_rows, -1)
    probed = draw_probed(scores, kept, share=0.3)
    assert probed.shape == (num_rows, 1)
    assert not torch.equal(probed, draw_probed(scores, kept, share=0.3))
    # Each about equally often, whatever its score: a share of 1 / 3, +- 5 standard deviations.
    shares = torch.bincount(probed[:, 0], minlength=6) / num_rows
    torch.testing.assert_close(shares[[1, 3, 5]], torch.full((3,), 1 / 3), rtol=0, atol=0.03)


@pytest.mark.usefixtures("keeps_the_best")
@each_guidance
def test_texts_of_one_image_accumulate_as_texts_of_their_own(guidance):
    inputs = QUESTIONS.make_inputs(training=True)
    image = inputs["pixel_values"][:1]
    repeated = {**inputs, "pixel_values": image.expand(4, -1, -1, -1)}
    shared = {**inputs, "pixel_values": image, "image_index": torch.zeros(4, dtype=torch.long)}
    # Nothing drawn, no batch norm.
    fields = {
        "selection_gate": 1.0,
        "patch_embedding_type": "linear",
        "schedule": f"1:{guidance}:0.6,3:{guidance}:0.6",
    }
    _, expected, _ = loss_and_gradients(QUESTIONS, repeated, **fields)
    _, gradients, _ = loss_and_gradients(QUESTIONS, shared, **fields)
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_only_training_with_gradients_has_a_gate():
    model = QUESTIONS.make_model(selection_gate=0.5, patch_embedding_type="linear")
    tower: TripsVisionModel = model.model.vision_model
    inputs = QUESTIONS.make_inputs(training=True)
    expected = kept_by(model(**inputs))
    assert tower(inputs["pixel_values"]).probed is None
    assert tower.train()(inputs["pixel_values"]).probed is not None
    with torch.no_grad():  # a model that was left in training mode keeps the best
        assert tower(inputs["pixel_values"]).probed is None
        assert kept_by(model.train()(**inputs)) == expected


@pytest.mark.parametrize("guidances", [("text", "text"), ("image", "text"), ("image", "image"), ("text", "random")])
@pytest.mark.parametrize("shared", [False, True])
def test_the_last_layer_that_drops_patches_learns(guidances, shared):
    first, second = guidances
    # The second layer keeps all by rounding: ceil(0.99 * (39 + 1)) = 40.
    schedule = f"1:{first}:0.6,3:{second}:0.99"
    model = QUESTIONS.make_model(selection_gate=0.3, schedule=schedule).model.train()
    inputs = Case(TripsModel).make_inputs()
    if shared:
        inputs["pixel_values"] = inputs["pixel_values"][:2]
        inputs["image_index"] = torch.tensor([0, 1, 1, 0])
    outputs = model(**inputs)
    last = outputs.selection[-1]
    assert last.scores.shape[1] == 40
    assert last.kept_indices.shape[1] == 40
    assert (last.kept_indices[:, -1] == -1).all()
    vision = outputs.vision_model_output
    assert vision.last_hidden_state.shape[1] == 41
    assert vision.probed.states.shape[1] == 8  # ceil(0.3 * 25)
    vision.probed.gate.retain_grad()
    loss_of(outputs).backward()
    assert (vision.probed.gate.grad[:, 1:] != 0).all()


@pytest.mark.parametrize("settings", ["text:0.99", "random:0.6"])
def test_training_without_a_layer_that_can_learn_is_refused(settings):
    model = QUESTIONS.make_model(selection_gate=0.3, schedule=f"1:{settings},3:{settings}").train()
    inputs = QUESTIONS.make_inputs(training=True)
    with pytest.raises(ValueError, match="selection_gate"):
        model(**inputs)
    model.eval()(**inputs)


@pytest.mark.parametrize("options", [{"preserve_rng_state": False}, {"use_reentrant": True}], ids=str)
def test_checkpointing_that_would_compute_something_else_is_refused(options):
    model = QUESTIONS.make_model()
    with pytest.raises(ValueError, match=next(iter(options))):
        enable_checkpointing(model, **options)
    assert not model.is_gradient_checkpointing


@each_guidance
def test_a_text_tries_other_tokens_than_the_best_in_training(guidance):
    model = QUESTIONS.make_model(schedule=f"1:{guidance}:0.6,3:{guidance}:0.6", selection_gate=0.3).train()
    inputs = QUESTIONS.make_inputs(training=True)
    first = kept_by(model(**inputs))
    second = kept_by(model(**inputs))
    assert first[:-1] == second[:-1]
    assert (first[-1] == second[-1]) == (guidance == "image")
