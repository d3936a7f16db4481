"""
Tests of question answering: the loss, greedy and beam generation, and the ranking of given answers against independent
computations; a question's answer depends on nothing but the question and its image; ten samples can be learned.
"""

import itertools

import pytest
import torch

from modeling_trips import TripsConfig, TripsForQuestionAnswering, TripsModel
from modeling_trips.modeling_trips_generation import label_loss, token_nll


PAD, START, END = 0, 1, 2
QUESTIONS = torch.tensor([[1, 5, 7, 9, 2], [1, 8, 2, 0, 0], [1, 4, 6, 2, 0], [1, 9, 9, 2, 0]])
MASK = (QUESTIONS != PAD).long()
IMAGE_INDEX = torch.tensor([1, 0, 1, 0])
# Six answers; the first two, and the two after, begin with the same token.
ANSWERS = torch.tensor(
    [[5, 6, END], [5, 7, END], [8, END, -100], [8, 3, END], [4, END, -100], [6, 6, END]],
)
# Seven answers to four questions, with weights.
LABELS = ANSWERS[[0, 3, 5, 2, 1, 4, 0]]
QUESTION_INDEX = torch.tensor([0, 0, 1, 2, 2, 2, 3])
WEIGHTS = torch.tensor([0.7, 0.3, 1.0, 0.1, 0.6, 0.3, 1.0])


def make_config(vocab_size=12, **selection):
    return TripsConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": 16,
            "patch_size": 4,
            "initializer_range": 0.4,
            **{"selection_layers": [2, 3], "keep_rate": 0.5, **selection},
        },
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 12,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.4,
        },
        fusion_encoder_config={"num_hidden_layers": 1},
        decoder_config={"num_hidden_layers": 2, "bos_token_id": START, "eos_token_id": END},
        initializer_range=0.4,
    )


def make_model(attn_implementation="sdpa", **fields):
    torch.manual_seed(0)
    config = make_config(**fields)
    return TripsForQuestionAnswering._from_config(config, attn_implementation=attn_implementation).eval()


def images(count=2):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def inputs():
    """Four questions about two images."""
    return {
        "input_ids": QUESTIONS,
        "attention_mask": MASK,
        "pixel_values": images(),
        "image_index": IMAGE_INDEX,
    }


def inputs_of(row):
    """One of them alone, without padding and without an index."""
    return {
        "input_ids": QUESTIONS[row : row + 1, : int(MASK[row].sum())],
        "pixel_values": images()[IMAGE_INDEX[row]][None],
    }


def log_probability(model, row, answer):
    """Of an answer (a list of ids) to question `row`: token after token, each on its own run of the whole model."""
    total, written = 0.0, [START]
    for token in answer:
        logits = model(**inputs_of(row), decoder_input_ids=torch.tensor([written])).logits[0, -1]
        total += logits.double().log_softmax(-1)[token].item()
        written.append(token)
    return total


def tokens_of(answer):
    return [token for token in answer.tolist() if token not in (-100, PAD)]


def kept(output):
    return [entry.kept_indices.tolist() for entry in output.selection]


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
    # A decoder that gets its states with a gradient reaches the text and the pixels.
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
# Generation


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
def test_greedy_generation_takes_the_likeliest_token_each_time():
    model = make_model()
    sequences = model.generate(**inputs(), max_new_tokens=5)
    for row in range(4):
        written = [START]
        while len(written) < 6 and written[-1] != END:
            logits = model(**inputs_of(row), decoder_input_ids=torch.tensor([written])).logits[0, -1]
            written.append(logits.argmax().item())
        assert tokens_of(sequences[row]) == written


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
def test_generation_from_a_prefix_equals_from_pixels():
    model = make_model()
    prefix = model.model.encode_images(images())
    with_prefix = {name: value for name, value in inputs().items() if name != "pixel_values"}
    for num_beams in (1, 3):
        expected = model.generate(**inputs(), max_new_tokens=6, num_beams=num_beams)
        output = model.generate(**with_prefix, prefix=prefix, max_new_tokens=6, num_beams=num_beams)
        assert torch.equal(output, expected)
    ranking = model.rank_answers(ANSWERS, **with_prefix, prefix=prefix)
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


# ---------------------------------------------------------------------------------------------------------------------
# Ranking


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
# Checkpoints, kernels, number formats, learning


@torch.no_grad()
def test_save_and_load_give_equal_outputs(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded, report = TripsForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    output, expected = loaded(**inputs(), labels=ANSWERS[:4]), model(**inputs(), labels=ANSWERS[:4])
    assert torch.equal(output.logits, expected.logits)
    assert kept(output) == kept(expected)
    options = {"num_beams": 2, "max_new_tokens": 6}
    assert torch.equal(loaded.generate(**inputs(), **options), model.generate(**inputs(), **options))

    bare, report = TripsModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(bare(**inputs()).last_hidden_state, expected.encoder_last_hidden_state)


@torch.no_grad()
def test_a_checkpoint_of_the_bare_model_fills_its_part(tmp_path):
    model = make_model()
    model.model.save_pretrained(tmp_path)
    loaded, report = TripsForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"decoder", "lm_head"}
    output, expected = loaded.model(**inputs()), model.model(**inputs())
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_sdpa_and_eager_agree():
    output, expected = (make_model(kernel)(**inputs(), labels=ANSWERS[:4]) for kernel in ("sdpa", "eager"))
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert kept(output) == kept(expected)


@torch.no_grad()
def test_captured_outputs():
    output = make_model("eager")(
        **inputs(), labels=LABELS, text_index=QUESTION_INDEX, output_attentions=True, output_hidden_states=True
    )
    assert [tuple(states.shape) for states in output.decoder_hidden_states] == [(7, 3, 24)] * 3
    assert [tuple(weights.shape) for weights in output.decoder_attentions] == [(7, 2, 3, 3)] * 2
    assert [tuple(weights.shape) for weights in output.cross_attentions] == [(7, 2, 3, 5)] * 2
    assert [tuple(states.shape) for states in output.encoder_hidden_states] == [(4, 5, 24)] * 2
    # No answer looks at the padding of its question.
    hidden = MASK[QUESTION_INDEX][:, None, None].expand(-1, 2, 3, -1) == 0
    assert all((weights[hidden] == 0).all() for weights in output.cross_attentions)


@torch.no_grad()
def test_bfloat16_is_finite_and_keeps_nearly_the_same_patches():
    model = make_model()
    expected = model(**inputs(), labels=ANSWERS[:4])
    output = model.bfloat16()(**inputs(), labels=ANSWERS[:4])
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.1, atol=0)
    same = total = 0
    for row, row_expected in zip(kept(output)[0], kept(expected)[0]):
        same, total = same + len(set(row) & set(row_expected)), total + len(row_expected)
    assert same >= 0.9 * total


def test_ten_samples_can_be_learned():
    """Two questions about each of five images: only who reads both the question and the image can tell."""
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
    with pytest.raises(ValueError, match="4 texts for 2 images"):
        model(QUESTIONS, images(2), MASK, labels=ANSWERS[:4])
    with pytest.raises(ValueError, match="4 texts for 2 images"):
        model.generate(QUESTIONS, pixel_values=images(2), attention_mask=MASK, max_new_tokens=2)
    with pytest.raises(ValueError, match="multiples of the patch size"):
        model(QUESTIONS, images(4)[..., :15], MASK, labels=ANSWERS[:4])
    with pytest.raises(ValueError, match="13 tokens, `max_position_embeddings` allows 12"):
        model(QUESTIONS, images(4), MASK, labels=torch.full((4, 13), 5))
    with pytest.raises(ValueError, match="exactly one of `pixel_values` and `prefix`"):
        model(**inputs(), prefix=model.model.encode_images(images()), labels=ANSWERS[:4])
    with pytest.raises(ValueError, match="6 rows of `labels` for 4 texts.*`text_index`"):
        model(**inputs(), labels=ANSWERS)
    with pytest.raises(ValueError, match=r"`loss_weights` must have shape \(4,\)"):
        model(**inputs(), labels=ANSWERS[:4], loss_weights=torch.ones(1))
    with pytest.raises(ValueError, match=r"`k` must be at least 1 \(got 0\)"):
        model.rank_answers(ANSWERS, k=0, **inputs())
    with pytest.raises(ValueError, match="must begin with a token"):
        model.rank_answers(torch.full((2, 3), -100), **inputs())
    with pytest.raises(ValueError, match="Give `labels` or `decoder_input_ids`, or call `generate`"):
        model(**inputs())


def test_generating_more_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="13 tokens, `max_position_embeddings` allows 12"):
        make_model().generate(**inputs(), min_new_tokens=20, max_new_tokens=20)


def test_resized_vocabulary_reaches_the_decoder():
    model = make_model()
    model.resize_token_embeddings(15)
    assert model.decoder.embeddings.word_embeddings.num_embeddings == 15
    assert model(**inputs(), labels=torch.full((4, 2), 14)).logits.shape[-1] == 15
