"""Beam search, caches and answer ranking against independent computations."""

import itertools

import pytest
import torch
from tiny_question_answering import (
    ANSWERS,
    END,
    MASK,
    PAD,
    QUESTIONS,
    START,
    images,
    inputs,
    inputs_of,
    log_probability,
    make_model,
    tokens_of,
)

from modeling_trips.modeling_trips import token_nll


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_with_a_cache_equals_without(attn_implementation, num_beams):
    model = make_model(attn_implementation)
    options = {"max_new_tokens": 6, "num_beams": num_beams, "return_dict_in_generate": True, "output_scores": True}
    cached = model.generate(**inputs(), **options, use_cache=True)
    plain = model.generate(**inputs(), **options, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.scores, plain.scores, rtol=1e-4, atol=1e-5)
    assert len({tuple(row) for row in cached.sequences.tolist()}) > 1


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
        logits = model(
            **inputs_of(row),
            labels=ids,
            text_index=torch.zeros(len(ids), dtype=torch.long),
        ).logits
        scores = -token_nll(logits, ids).sum(-1)
        assert tuple(output.sequences[row, 1:].tolist())[: len(answers[scores.argmax()])] == answers[scores.argmax()]
        torch.testing.assert_close(output.sequences_scores[row], scores.max(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generation_from_an_image_cache_equals_from_pixels():
    model = make_model()
    image_cache = model.model.encode_images(images())
    with_cache = {name: value for name, value in inputs().items() if name != "pixel_values"}
    for num_beams in (1, 3):
        expected = model.generate(**inputs(), max_new_tokens=6, num_beams=num_beams)
        output = model.generate(**with_cache, image_cache=image_cache, max_new_tokens=6, num_beams=num_beams)
        assert torch.equal(output, expected)
    ranking = model.rank_answers(ANSWERS, **with_cache, image_cache=image_cache)
    assert torch.equal(ranking.answer_indices, model.rank_answers(ANSWERS, **inputs()).answer_indices)


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 3])
def test_encoded_once_and_generated_twice(num_beams):
    model = make_model()
    expected = model.generate(**inputs(), num_beams=num_beams, max_new_tokens=4)
    encoder_outputs = model.model(**inputs())
    for _ in range(2):
        generated = model.generate(
            QUESTIONS,
            encoder_outputs=encoder_outputs,
            attention_mask=MASK,
            num_beams=num_beams,
            max_new_tokens=4,
        )
        assert torch.equal(generated, expected)
    assert len(encoder_outputs.last_hidden_state) == 4


@torch.no_grad()
def test_encoder_outputs_may_be_a_tuple():
    model, start = make_model(), torch.full((4, 1), START)
    expected = model(**inputs(), decoder_input_ids=start).logits
    encoder_outputs = model.model(**inputs(), return_dict=False)
    assert isinstance(encoder_outputs, tuple)
    actual = model(attention_mask=MASK, encoder_outputs=encoder_outputs, decoder_input_ids=start).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("answers_per_step", [1, 2, 5])
def test_ranking_in_steps_changes_nothing(answers_per_step):
    model = make_model()
    expected = model.rank_answers(ANSWERS, answers_per_step=100, **inputs())
    actual = model.rank_answers(ANSWERS, answers_per_step=answers_per_step, **inputs())
    assert torch.equal(actual.answer_indices, expected.answer_indices)
    torch.testing.assert_close(actual.scores, expected.scores)


@torch.no_grad()
@pytest.mark.parametrize("k", [6, 128])
def test_ranking_all_answers_is_by_their_likelihood(k):
    model = make_model()
    ranking = model.rank_answers(ANSWERS, k=k, **inputs())
    for row in range(4):
        scores = torch.tensor([log_probability(model, row, tokens_of(answer)) for answer in ANSWERS])
        assert ranking.answer_indices[row].tolist() == scores.argsort(descending=True).tolist()
        expected_scores = scores.sort(descending=True).values
        torch.testing.assert_close(ranking.scores[row], expected_scores, rtol=1e-5, atol=1e-5)
    assert len({tuple(row) for row in ranking.answer_indices.tolist()}) > 1


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
        differs |= set(expected) != set(sorted(scores, key=lambda i: -scores[i])[:k])
    assert differs  # from scoring all answers in full


@torch.no_grad()
def test_of_answers_with_the_same_first_token_the_first_listed_go_on():
    answers = torch.tensor([[first, second, END] for first in (5, 6) for second in range(3, 12)])
    model = make_model()
    ranking = model.rank_answers(answers, k=4, **inputs())
    for row in range(4):
        first = model(**inputs_of(row), decoder_input_ids=torch.tensor([[START]])).logits[0, 0]
        start = 0 if first[5] > first[6] else 9
        assert sorted(ranking.answer_indices[row].tolist()) == [start, start + 1, start + 2, start + 3]


@torch.no_grad()
def test_ways_of_marking_the_padding_of_answers_are_equal():
    model = make_model()
    expected = model.rank_answers(ANSWERS, **inputs())
    padded = ANSWERS.masked_fill(ANSWERS == -100, PAD)
    masked = ANSWERS.masked_fill(ANSWERS == -100, 9), ANSWERS != -100
    for output in (model.rank_answers(padded, **inputs()), model.rank_answers(*masked, **inputs())):
        assert torch.equal(output.answer_indices, expected.answer_indices)
        torch.testing.assert_close(output.scores, expected.scores)
