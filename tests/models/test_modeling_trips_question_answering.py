"""Question answering: loss, beam search, caches and answer ranking against independent computations."""

import itertools

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
    images,
    inputs,
    inputs_of,
    log_probability,
    make_model,
    tokens_of,
)

from modeling_trips.modeling_trips import token_nll


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


def test_loss_of_no_labels_is_nan_as_of_the_heads_of_transformers():
    model = make_model()
    nothing = torch.full_like(ANSWERS[:4], -100)
    assert model(**inputs(), labels=nothing).loss.isnan()
    assert model(**inputs(), labels=nothing, num_items_in_batch=torch.tensor(5)).loss == 0  # others are elsewhere


def test_bad_inputs_are_refused():
    model = make_model()
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
def test_generating_for_an_image_that_is_not_there_is_refused(as_cache):
    model, batch = make_model(), inputs()
    batch["image_index"] = torch.tensor([1, 0, -1, 0])
    if as_cache:
        batch["image_cache"] = model.model.encode_images(batch.pop("pixel_values"))
    with pytest.raises(IndexError):
        model.generate(**batch, max_new_tokens=2)


@torch.no_grad()
def test_beam_search_with_enough_beams_is_the_exhaustive_search():
    length = 3
    model = make_model(vocab_size=10)
    others = [token for token in range(10) if token != END]
    answers = []
    for stop in range(length):
        answers += [(*prefix, END) for prefix in itertools.product(others, repeat=stop)]
    answers += itertools.product(others, repeat=length)  # cut off before the end token
    ids = torch.full((len(answers), length), -100)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = torch.tensor(answer)
    assert len(answers) == 1 + 9 + 81 + 729
    output = model.generate(
        **inputs(),
        max_new_tokens=length,
        num_beams=90,  # as many as there are unfinished prefixes, and more
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row in range(4):
        logits = model(**inputs_of(row), labels=ids, text_index=torch.zeros(len(ids), dtype=torch.long)).logits
        scores = -token_nll(logits, ids).sum(-1)
        assert tuple(output.sequences[row, 1:].tolist())[: len(answers[scores.argmax()])] == answers[scores.argmax()]
        torch.testing.assert_close(output.sequences_scores[row], scores.max(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_images_or_texts_encoded_ahead_give_the_same_answers_and_ranking():
    model, options = make_model(), {"num_beams": 3, "max_new_tokens": 6}
    cached = {name: value for name, value in inputs().items() if name != "pixel_values"}
    cached["image_cache"] = model.model.encode_images(images())
    encoded = {"encoder_outputs": model.model(**inputs()), "attention_mask": MASK}
    expected, ranking_expected = model.generate(**inputs(), **options), model.rank_answers(ANSWERS, **inputs())
    for _ in range(2):
        assert torch.equal(model.generate(**cached, **options), expected)
        assert torch.equal(model.generate(QUESTIONS, **encoded, **options), expected)
    for answers in (ANSWERS, ANSWERS.masked_fill(ANSWERS == -100, PAD)):
        ranking = model.rank_answers(answers, answers_per_step=2, **cached)
        assert torch.equal(ranking.answer_indices, ranking_expected.answer_indices)
        torch.testing.assert_close(ranking.scores, ranking_expected.scores)


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2])
def test_ranking_in_two_stages(k):
    # All first tokens differ, so that the first stage has no ties.
    answers = torch.tensor([[5, END, -100], [7, END, -100], [8, 7, END], [4, END, -100], [6, 4, END]])
    model = make_model()
    ranking = model.rank_answers(answers, k=k, **inputs())
    differs = False
    for row in range(4):
        first = model(**inputs_of(row), decoder_input_ids=torch.tensor([[START]])).logits[0, 0].softmax(-1)
        by_first = sorted(range(5), key=lambda i: -first[answers[i, 0]].item())
        scores = {i: log_probability(model, row, tokens_of(answers[i])) for i in range(5)}
        expected = sorted(by_first[:k], key=lambda i: -scores[i])
        assert ranking.answer_indices[row].tolist() == expected
        assert ranking.scores[row].tolist() == pytest.approx([scores[i] for i in expected], rel=1e-5)
        differs |= set(expected) != set(sorted(scores, key=lambda i: -scores[i])[:k])
    assert differs  # from scoring all answers in full
