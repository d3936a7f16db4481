"""Question answering: loss, beam search, caches and answer ranking against independent computations."""

import itertools

import pytest
import torch
from tiny_question_answering import (
    ANSWERS,
    END,
    IMAGE_INDEX,
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
