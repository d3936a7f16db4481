"""Question answering: loss, beam search, caches and answer ranking against independent computations."""

import pytest
import torch
from tiny_question_answering import (
    ANSWERS,
    END,
    LABELS,
    MASK,
    PAD,
    QUESTION_INDEX,
    QUESTIONS,
    START,
    WEIGHTS,
    inputs,
    inputs_of,
    log_probability,
    make_model,
    tokens_of,
)
from torch.testing import assert_close


@torch.no_grad()
def test_loss_is_the_weighted_log_likelihood_per_token():
    model = make_model()
    answers = {"labels": LABELS, "text_index": QUESTION_INDEX, "loss_weights": WEIGHTS}
    output = model(**inputs(), **answers)
    assert output.logits.shape == (7, 3, 12)
    total = 0.0
    for row, answer, weight in zip(QUESTION_INDEX.tolist(), LABELS, WEIGHTS.tolist()):
        total -= weight * log_probability(model, row, tokens_of(answer))
    num_tokens = 19  # of seven answers of three tokens, two are one token shorter
    assert output.loss.item() == pytest.approx(total / num_tokens, rel=1e-5)
    per_batch = model(**inputs(), **answers, num_items_in_batch=torch.tensor(50))
    assert per_batch.loss.item() == pytest.approx(total / 50, rel=1e-5)


def test_loss_of_no_labels_is_nan_as_of_the_heads_of_transformers():
    model = make_model()
    nothing = torch.full_like(ANSWERS[:4], -100)
    assert model(**inputs(), labels=nothing).loss.isnan()
    assert model(**inputs(), labels=nothing, num_items_in_batch=torch.tensor(5)).loss == 0  # others are elsewhere


def test_bad_inputs_are_refused():
    model = make_model()
    for named, call, wrong in (
        ("text_index", model, {"labels": ANSWERS}),
        ("loss_weights", model, {"labels": ANSWERS[:4], "loss_weights": torch.ones(1)}),
        ("decoder_input_ids", model, {}),
        ("`k`", model.rank_answers, {"answer_ids": ANSWERS, "k": 0}),
        ("answer_ids", model.rank_answers, {"answer_ids": torch.full((2, 3), -100)}),
    ):
        with pytest.raises(ValueError, match=named):
            call(**inputs(), **wrong)


@pytest.mark.parametrize("as_cache", [False, True], ids=["pixels", "image_cache"])
def test_generating_for_an_image_that_is_not_there_is_refused(as_cache):
    model, batch = make_model(), inputs()
    batch["image_index"] = torch.tensor([1, 0, -1, 0])
    if as_cache:
        batch["image_cache"] = model.model.encode_images(batch.pop("pixel_values"))
    with pytest.raises(IndexError):
        model.generate(**batch, max_new_tokens=2)


@torch.no_grad()
def test_images_or_texts_encoded_ahead_give_the_same_answers_and_ranking():
    model = make_model()
    options = {"num_beams": 3, "max_new_tokens": 6}
    expected = model.generate(**inputs(), **options)
    expected_ranking = model.rank_answers(ANSWERS, **inputs())
    cached = inputs()
    cached["image_cache"] = model.model.encode_images(cached.pop("pixel_values"))
    encoder_outputs = model.model(**inputs())
    for _ in range(2):
        assert torch.equal(model.generate(**cached, **options), expected)
        answers = model.generate(QUESTIONS, attention_mask=MASK, encoder_outputs=encoder_outputs, **options)
        assert torch.equal(answers, expected)
    for answers in (ANSWERS, ANSWERS.masked_fill(ANSWERS == -100, PAD)):
        ranking = model.rank_answers(answers, answers_per_step=2, **cached)
        assert torch.equal(ranking.answer_indices, expected_ranking.answer_indices)
        assert_close(ranking.scores, expected_ranking.scores)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2])
def test_ranking_in_two_stages(k):
    # All first tokens differ, so that the first stage has no ties.
    answers = torch.tensor([[5, END, -100], [7, END, -100], [8, 7, END], [4, END, -100], [6, 4, END]])
    model = make_model()
    ranking = model.rank_answers(answers, k=k, **inputs())
    differs = False
    for row in range(4):
        logits = model(**inputs_of(row), decoder_input_ids=torch.tensor([[START]])).logits[0, 0]
        scores = torch.tensor([log_probability(model, row, tokens_of(answer)) for answer in answers])
        finalists = logits[answers[:, 0]].topk(k).indices
        best_first = finalists[scores[finalists].argsort(descending=True)]
        assert torch.equal(ranking.answer_indices[row], best_first)
        assert_close(ranking.scores[row], scores[best_first], rtol=1e-5, atol=0)
        differs |= set(best_first.tolist()) != set(scores.topk(k).indices.tolist())
    assert differs  # from scoring all answers in full
