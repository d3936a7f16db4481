"""Question answering: the loss against independent computations, and an answer apart from the rest of the batch."""

import pytest
import torch
from tiny_question_answering import (
    ANSWERS,
    IMAGE_INDEX,
    LABELS,
    MASK,
    QUESTION_INDEX,
    QUESTIONS,
    WEIGHTS,
    images,
    inputs,
    inputs_of,
    kept,
    log_probability,
    make_model,
    tokens_of,
)

from modeling_trips import TripsForQuestionAnswering
from modeling_trips.modeling_trips import label_loss, token_nll


@torch.no_grad()
def test_loss_is_the_weighted_log_likelihood_per_token():
    model = make_model()
    labels, index, weights = LABELS, QUESTION_INDEX, WEIGHTS
    output = model(**inputs(), labels=labels, text_index=index, loss_weights=weights)
    expected = -sum(
        weight * log_probability(model, row, tokens_of(answer))
        for row, answer, weight in zip(index.tolist(), labels, weights.tolist())
    )
    num_tokens = 19  # of seven answers of three tokens, two are one token shorter
    torch.testing.assert_close(output.loss.item(), expected / num_tokens, rtol=1e-5, atol=0)
    assert output.logits.shape == (7, 3, 12)
    per_batch = model(
        **inputs(), labels=labels, text_index=index, loss_weights=weights, num_items_in_batch=torch.tensor(50)
    )
    torch.testing.assert_close(per_batch.loss.item(), expected / 50, rtol=1e-5, atol=0)


def test_loss_by_hand():
    # Two answers of at most two tokens; probabilities (1/2, 1/4, 1/4) everywhere.
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(2, 2, 3)
    labels = torch.tensor([[0, 1], [2, -100]])
    ln2 = torch.tensor(2.0).log()
    torch.testing.assert_close(token_nll(logits, labels), torch.tensor([[1.0, 2.0], [2.0, 0.0]]) * ln2)
    torch.testing.assert_close(label_loss(logits, labels), ln2 * 5 / 3)
    torch.testing.assert_close(label_loss(logits, labels, torch.tensor([1.0, 0.5])), ln2 * 4 / 3)
    torch.testing.assert_close(label_loss(logits, labels, torch.tensor([1.0, 0.5]), 8), ln2 * 4 / 8)
    assert label_loss(logits.bfloat16(), labels).dtype == torch.float32


def test_embeddings_are_tied_and_trained_as_one(tmp_path):
    model = make_model()
    embedding = model.decoder.embeddings.word_embeddings.weight
    assert model.lm_head.decoder.weight is embedding
    assert model.get_input_embeddings().weight is not embedding  # the text encoder has its own
    with torch.no_grad():
        embedding.add_(1.0)
    assert torch.equal(model.lm_head.decoder.weight, embedding)
    model.save_pretrained(tmp_path)
    loaded = TripsForQuestionAnswering.from_pretrained(tmp_path)
    assert loaded.lm_head.decoder.weight is loaded.decoder.embeddings.word_embeddings.weight
    assert torch.equal(loaded.lm_head.decoder.weight, embedding)


@torch.no_grad()
def test_padding_batch_and_order_change_no_answer():
    model = make_model()
    batch = {name: torch.nn.functional.pad(inputs()[name], (0, 3)) for name in ("input_ids", "attention_mask")}
    order = torch.tensor([3, 1, 0, 2])
    batch = {name: value[order] for name, value in batch.items()}
    batch |= {"pixel_values": images(), "image_index": IMAGE_INDEX[order]}
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True}
    together = model.generate(**batch, **options)
    ranking = model.rank_answers(ANSWERS, **batch)
    chosen = kept(model(**batch, labels=ANSWERS[:4]))
    for position, row in enumerate(order.tolist()):
        alone = model.generate(**inputs_of(row), **options)
        assert tokens_of(together.sequences[position]) == tokens_of(alone.sequences[0])
        ranking_alone = model.rank_answers(ANSWERS, **inputs_of(row))
        assert ranking.answer_indices[position].tolist() == ranking_alone.answer_indices[0].tolist()
        torch.testing.assert_close(ranking.scores[position], ranking_alone.scores[0], rtol=1e-4, atol=1e-5)
        assert [rows[position] for rows in chosen] == [rows[0] for rows in kept(ranking_alone)]


def test_bad_inputs_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="image_index"):
        model.generate(QUESTIONS, pixel_values=images(2), attention_mask=MASK, max_new_tokens=2)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(QUESTIONS, images(4), MASK, labels=torch.full((4, 13), 5))
    with pytest.raises(ValueError, match="text_index"):
        model(**inputs(), labels=ANSWERS)
    with pytest.raises(ValueError, match="loss_weights"):
        model(**inputs(), labels=ANSWERS[:4], loss_weights=torch.ones(1))
    with pytest.raises(ValueError, match="`k`"):
        model.rank_answers(ANSWERS, k=0, **inputs())
    with pytest.raises(ValueError, match="answer_ids"):
        model.rank_answers(torch.full((2, 3), -100), **inputs())
    with pytest.raises(ValueError, match="decoder_input_ids"):
        model(**inputs())


@pytest.mark.parametrize("as_cache", [False, True], ids=["pixels", "image_cache"])
@pytest.mark.parametrize("wrong", [2, -1])
def test_generating_for_an_image_that_is_not_there_is_refused(as_cache, wrong):
    model, batch = make_model(), inputs()
    batch["image_index"] = torch.tensor([1, 0, wrong, 0])
    if as_cache:
        batch["image_cache"] = model.model.encode_images(batch.pop("pixel_values"))
    with pytest.raises(ValueError, match=r"image_index\[2\]"):
        model.generate(**batch, max_new_tokens=2)


def test_generating_more_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="max_position_embeddings"):
        make_model().generate(**inputs(), min_new_tokens=20, max_new_tokens=20)
