"""Question answering: loss, beam search, caches and answer ranking against independent computations."""

import pytest
import torch
from tiny_question_answering import (
    ANSWERS,
    END,
    LABELS,
    MASK,
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

from modeling_trips import TripsForQuestionAnswering


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


@pytest.mark.parametrize("as_cache", [False, True], ids=["pixels", "image_cache"])
@pytest.mark.parametrize("wrong", [2, -1])
def test_generating_for_an_image_that_is_not_there_is_refused(as_cache, wrong):
    model, batch = make_model(), inputs()
    batch["image_index"] = torch.tensor([1, 0, wrong, 0])
    if as_cache:
        batch["image_cache"] = model.model.encode_images(batch.pop("pixel_values"))
    with pytest.raises(ValueError, match=r"image_index\[2\]"):
        model.generate(**batch, max_new_tokens=2)


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
