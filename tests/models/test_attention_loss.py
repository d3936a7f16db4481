"""Attention supervision of the box head and of a question's [CLS]: examples by hand, weight and learning."""

import math

import pytest
import torch
from tiny_models import ANSWERS, BOXES, IMAGES, TEXTS, enable_checkpointing, make_config

from modeling_trips import TripsForQuestionAnswering, TripsForVisualGrounding
from modeling_trips.patch_selection import attention_losses


def make_model(coefficient=2.0, **fields):
    torch.manual_seed(0)
    config = make_config(**fields)
    config.attention_loss_weight = coefficient
    return TripsForVisualGrounding._from_config(config, attn_implementation="sdpa").train()


def batch(rows=slice(0, 4)):
    inputs = {"input_ids": TEXTS, "attention_mask": (TEXTS != 0).long(), "pixel_values": IMAGES[:, 0], "labels": BOXES}
    return {name: value[rows] for name, value in inputs.items()}


def test_the_loss_by_hand():
    """The remaining tokens of a grid of 2 x 2 are patch 3, a fused token and patch 0."""
    right, top_right = [0.75, 0.5, 0.5, 1.0], [0.75, 0.25, 0.5, 0.5]
    looks, indices = torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([[3, -1, 0]])
    losses = attention_losses(looks.expand(2, 3), indices, torch.tensor([right, top_right]), (2, 2))
    # Patch 3 lies in the right half. No remaining patch lies in the top right, which was fused; the attention to the
    # fused token is ignored.
    assert losses.tolist() == pytest.approx([-math.log(0.2 / 0.7), 0.0])
    # Unpruned, all texts share a row of indices; attention 0.4 and 0.1 to the right half is pulled to 2 to 1.
    looks = torch.tensor([[0.3, 0.4, 0.2, 0.1]])
    loss = attention_losses(looks, torch.arange(4)[None], torch.tensor([right]), (2, 2))
    assert loss.item() == pytest.approx(2 / 3 * math.log(2 / 3 / 0.4) + 1 / 3 * math.log(1 / 3 / 0.1))


@pytest.mark.parametrize("keep_rate", [0.5, 1.0])
def test_it_is_a_part_of_the_loss_in_training_alone(keep_rate):
    supervised, unsupervised = (make_model(coefficient, keep_rate=keep_rate)(**batch()) for coefficient in (2.0, 0.0))
    assert unsupervised.attention_loss is None and supervised.attention_loss > 0
    torch.testing.assert_close(supervised.loss - unsupervised.loss, 2 * supervised.attention_loss)
    assert make_model(keep_rate=keep_rate).eval()(**batch()).attention_loss is None
    assert make_config().attention_loss_weight == 0


def test_parts_of_a_batch_add_up_to_its_loss():
    model = make_model(patch_embedding_type="linear")
    parts = [model(**batch(rows), num_items_in_batch=4 * 4).attention_loss for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), model(**batch()).attention_loss)


def make_reader(coefficient=2.0, attn_implementation="sdpa", **fields):
    """Return a question answering model in training mode."""
    torch.manual_seed(0)
    config = make_config(**fields)
    config.attention_loss_weight = coefficient
    return TripsForQuestionAnswering._from_config(config, attn_implementation=attn_implementation).train()


def questions(rows=slice(0, 4)):
    return {**batch(rows), "labels": ANSWERS[rows], "regions": BOXES[rows]}


@pytest.mark.parametrize("fusion_type", ["cross_attention", "skip_connected"])
@pytest.mark.parametrize("mode", [{}, {"keep_rate": 1.0}], ids=str)
def test_where_cls_looks_is_what_eager_attention_tells(mode, fusion_type):
    model = make_reader(fusion_type=fusion_type, **mode).eval()
    eager = make_reader(attn_implementation="eager", fusion_type=fusion_type, **mode).eval()
    inputs = {**batch(), "image_index": torch.tensor([0, 0, 2, 3])}
    del inputs["labels"]
    looks = model.model(**inputs, output_cls_attention=True).cls_attention
    expected = eager.model(**inputs, output_attentions=True)
    torch.testing.assert_close(looks, expected.cross_attentions[-1][:, :, 0], atol=1e-6, rtol=1e-5)
    assert model.model(**inputs).cls_attention is None


@pytest.mark.parametrize("fields", [{"keep_rate": 0.5}, {"keep_rate": 1.0}], ids=str)
def test_questions_have_it_in_training_where_regions_are_known(fields):
    supervised, unsupervised = (make_reader(coefficient, **fields)(**questions()) for coefficient in (2.0, 0.0))
    assert unsupervised.attention_loss is None and supervised.attention_loss > 0
    torch.testing.assert_close(supervised.loss - unsupervised.loss, 2 * supervised.attention_loss)
    nowhere = torch.zeros(4, 4)
    assert make_reader(**fields)(**{**questions(), "regions": nowhere}).attention_loss == 0
    assert make_reader(**fields)(**{**questions(), "regions": None}).attention_loss is None
    assert make_reader(**fields).eval()(**questions()).attention_loss is None


def test_questions_apart_and_together_have_the_same_loss():
    """Each question has the weight of its label tokens."""
    model, num_tokens = make_reader(patch_embedding_type="linear"), int((ANSWERS[:4] != -100).sum())
    rows = (slice(row, row + 1) for row in range(4))
    parts = [model(**questions(row), num_items_in_batch=num_tokens).attention_loss for row in rows]
    torch.testing.assert_close(sum(parts), model(**questions()).attention_loss)


def test_answers_to_one_question_share_where_it_looks():
    model = make_reader(patch_embedding_type="linear")
    inputs = {**questions(slice(0, 2)), "labels": ANSWERS[:3], "text_index": torch.tensor([0, 0, 1])}
    apart = {name: value[[0, 0, 1]] for name, value in questions(slice(0, 2)).items()}
    torch.testing.assert_close(
        model(**inputs).attention_loss, model(**{**apart, "labels": ANSWERS[:3]}).attention_loss
    )


def test_a_question_learns_to_look_into_its_region():
    model = make_reader()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        output = model(**questions())
        losses.append(output.attention_loss.item())
        optimizer.zero_grad()
        output.attention_loss.backward()
        optimizer.step()
    assert losses[0] > 1 and losses[-1] < 0.2, (losses[0], losses[-1])


@pytest.mark.parametrize("fusion_type", ["cross_attention", "skip_connected"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_it_teaches_with_gradient_checkpointing_as_without(use_reentrant, fusion_type):
    gradients = []
    for checkpointing in (False, True):
        model = make_reader(fusion_type=fusion_type)
        if checkpointing:
            enable_checkpointing(model, use_reentrant=use_reentrant)
        model(**questions()).attention_loss.backward()
        layer = model.model.fusion_model.encoder.layer[0]
        gradients.append(layer.crossattention.self.query.weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_training_with_it_is_one_graph():
    model = make_reader(patch_embedding_type="linear")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**questions()).attention_loss, model(**questions()).attention_loss)


def test_a_fusion_without_cross_attention_refuses_it():
    with pytest.raises(ValueError, match="attention_loss_weight"):
        make_reader(fusion_type="single_stream")(**questions())
