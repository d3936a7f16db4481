"""Question answering: the loss against independent computations; independence of an answer from the rest of the
batch; checkpoints, kernels and dtypes; and learning of ten samples."""

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


# ---------------------------------------------------------------------------------------------------------------------
# Loss


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


@torch.no_grad()
def test_loss_with_one_answer_per_question_and_no_weights():
    model = make_model()
    labels = ANSWERS[:4]
    expected = -sum(log_probability(model, row, tokens_of(answer)) for row, answer in enumerate(labels)) / 11
    torch.testing.assert_close(model(**inputs(), labels=labels).loss.item(), expected, rtol=1e-5, atol=0)


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


def test_gradient_accumulation_equals_the_larger_batch():
    gradients = []
    num_items = (LABELS != -100).sum()
    for parts in ([slice(0, 7)], [slice(0, 2), slice(2, 3), slice(3, 7)]):
        model = make_model().double()
        for part in parts:
            batch = {**inputs(), "pixel_values": images().double()}
            model(
                **batch,
                labels=LABELS[part],
                text_index=QUESTION_INDEX[part],
                loss_weights=WEIGHTS[part],
                num_items_in_batch=num_items,
            ).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_every_parameter_is_trained():
    model = make_model()
    model(**inputs(), labels=LABELS, text_index=QUESTION_INDEX).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    # The decoder's gradient reaches the text and the pixels.
    for part in (model.model.text_model, model.model.vision_model, model.model.fusion_model, model.decoder):
        assert sum(parameter.grad.norm() for parameter in part.parameters()) > 1e-3


def test_labels_are_shifted_behind_the_start_token():
    shifted = make_model().prepare_decoder_input_ids_from_labels(ANSWERS[[0, 2]])
    assert shifted.tolist() == [[START, 5, 6], [START, 8, END]]
    long = torch.tensor([[5, END, -100, -100]])
    assert make_model().prepare_decoder_input_ids_from_labels(long).tolist() == [[START, 5, END, PAD]]


@torch.no_grad()
def test_padding_of_the_labels_changes_nothing():
    model = make_model()
    expected = model(**inputs(), labels=ANSWERS[:4]).loss
    longer = torch.nn.functional.pad(ANSWERS[:4], (0, 5), value=-100)
    torch.testing.assert_close(model(**inputs(), labels=longer).loss, expected)


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


# ---------------------------------------------------------------------------------------------------------------------
# A question's answer depends on the question and its image


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


@torch.no_grad()
def test_answers_depend_on_the_question_and_on_the_image():
    model = make_model()
    scores = model.rank_answers(ANSWERS, **inputs()).scores
    other_images = model.rank_answers(ANSWERS, **{**inputs(), "pixel_values": images().flip(0)}).scores
    other_questions = model.rank_answers(
        ANSWERS, **{**inputs(), "input_ids": QUESTIONS.where(QUESTIONS != 9, 3)}
    ).scores
    assert ((scores - other_images).abs().amax(1) > 1e-3).all()
    assert ((scores - other_questions).abs().amax(1) > 1e-3).tolist() == [True, False, False, True]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, kernels, dtypes, learning


def test_ten_samples_can_be_learned():
    """Two questions about each of five images. The answer depends on both the question and the image."""
    model = make_model(vocab_size=20).train()
    questions = torch.tensor([[1, 5, 7, 2], [1, 6, 2, 0]]).repeat(5, 1)
    image_index = torch.arange(5).repeat_interleave(2)
    answers = torch.tensor([[token, 9, END] if token % 3 else [token, END, -100] for token in range(8, 18)])
    batch = {
        "input_ids": questions,
        "attention_mask": (questions != PAD).long(),
        "pixel_values": images(5),
        "image_index": image_index,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(**batch, labels=answers).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    model.eval()
    sequences = model.generate(**batch, max_new_tokens=4)
    assert [tokens_of(row)[1:] for row in sequences] == [tokens_of(row) for row in answers]
    assert model.rank_answers(answers, **batch).answer_indices[:, 0].tolist() == list(range(10))


# ---------------------------------------------------------------------------------------------------------------------
# Bad inputs


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
