"""
`generate` of every class that generates text, in place of Transformers' generation suite, which its source
distribution lacks. Caches, beam search, cached image states and padding are tested in
test_modeling_trips_question_answering.py.
"""

import pytest
import torch
from transformers import GenerationConfig

from modeling_trips import TripsConfig, TripsForVisualGrounding
from modeling_trips.modeling_trips_text import CACHE_NAME
from modeling_trips.registration_trips import MODELS


PAD, START, END = 0, 1, 2
VOCABULARY = 12
QUESTIONS = torch.tensor([[1, 5, 7, 9, 2], [1, 8, 2, 0, 0], [1, 4, 6, 2, 0], [1, 9, 9, 2, 0]])
IMAGE_INDEX = torch.tensor([1, 0, 1, 0])
ENDLESS = {"eos_token_id": VOCABULARY + 1}  # an end token that no text can have

generative_classes = dict.fromkeys(model for models in MODELS.values() for model in models if model.can_generate())
each_class = pytest.mark.parametrize("model_class", generative_classes, ids=lambda model_class: model_class.__name__)


def make_model(model_class, attn_implementation="sdpa"):
    """Return a model whose texts differ between questions and tokens. Two of four texts end with the end token."""
    torch.manual_seed(36)
    config = TripsConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": 16,
            "patch_size": 4,
            "selection_layers": [2, 3],
            "keep_rate": 0.5,
            "initializer_range": 0.4,
        },
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 10,
            "initializer_range": 0.4,
        },
        fusion_encoder_config={"num_hidden_layers": 1},
        decoder_config={"num_hidden_layers": 2, "bos_token_id": START, "eos_token_id": END},
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    model = model_class._from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for name, weight in model.decoder.named_parameters():
            if name.endswith("output.dense.weight"):
                weight.mul_(0.3)  # otherwise the question dominates the generated tokens
    return model


def inputs():
    """Four questions about two images."""
    return {
        "input_ids": QUESTIONS,
        "attention_mask": (QUESTIONS != PAD).long(),
        "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
        "image_index": IMAGE_INDEX,
    }


def next_token_scores(model, written):
    """Return the log-probabilities of the token after each row of `written`, without a cache."""
    return model(**inputs(), decoder_input_ids=written, use_cache=False).logits[:, -1].log_softmax(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Greedy search


@each_class
@torch.no_grad()
def test_greedy_search_writes_the_likeliest_token_and_says_how_likely(model_class):
    model = make_model(model_class)
    output = model.generate(
        **inputs(), max_new_tokens=6, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    written, ended = torch.full((4, 1), START), torch.zeros(4, dtype=torch.bool)
    for logits, scores in zip(output.logits, output.scores, strict=True):
        assert torch.equal(logits, scores)  # nothing changes them
        expected = next_token_scores(model, written)
        torch.testing.assert_close(logits.log_softmax(dim=-1)[~ended], expected[~ended], rtol=1e-4, atol=1e-5)
        token = expected.argmax(dim=-1).masked_fill(ended, PAD)
        written = torch.cat((written, token[:, None]), dim=1)
        ended |= token == END
    assert torch.equal(output.sequences, written)
    assert len({tuple(row) for row in written.tolist()}) > 1


@each_class
def test_an_end_token_ends_a_text_and_padding_follows(model_class):
    model = make_model(model_class)
    free = model.generate(**inputs(), max_new_tokens=6, **ENDLESS)
    ends = [free[0, 2].item(), free[1, 4].item()]
    expected = free.clone()
    for row in expected:
        first = min((i for i in range(1, 7) if row[i] in ends), default=7)
        row[first + 1 :] = PAD
    expected = expected[:, (expected != PAD).any(dim=0)]
    assert PAD in expected and (expected[:, -1] != PAD).any()
    stopped = model.generate(**inputs(), max_new_tokens=6, eos_token_id=ends, pad_token_id=PAD)
    assert torch.equal(stopped, expected)


@each_class
def test_lengths_are_kept(model_class):
    model = make_model(model_class)
    free = model.generate(**inputs(), max_new_tokens=8, **ENDLESS)
    assert free.shape == (4, 9)  # with the start token
    assert torch.equal(model.generate(**inputs(), max_new_tokens=4, **ENDLESS), free[:, :5])
    assert torch.equal(model.generate(**inputs(), max_new_tokens=None, max_length=4, **ENDLESS), free[:, :4])
    ends = free[:, 1].unique().tolist()  # the first token of every text, so that all would end at once
    assert model.generate(**inputs(), eos_token_id=ends, pad_token_id=PAD).shape == (4, 2)
    longer = model.generate(**inputs(), min_new_tokens=3, max_new_tokens=3, eos_token_id=ends, pad_token_id=PAD)
    assert longer.shape == (4, 4) and not torch.isin(longer[:, 1:], torch.tensor(ends)).any()


@each_class
def test_without_a_length_a_text_fits_the_positions(model_class):
    assert make_model(model_class).generate(**inputs(), **ENDLESS).shape == (4, 11)


@each_class
def test_a_prompt_is_continued(model_class):
    model = make_model(model_class)
    expected = model.generate(**inputs(), max_new_tokens=6, **ENDLESS)
    continued = model.generate(**inputs(), decoder_input_ids=expected[:, :4], max_new_tokens=3, **ENDLESS)
    assert torch.equal(continued, expected)
    other = expected[:, :2].clone()
    other[:, 1] = (other[:, 1] - 3 + 1) % (VOCABULARY - 3) + 3
    continued = model.generate(**inputs(), decoder_input_ids=other, max_new_tokens=3, **ENDLESS)
    assert torch.equal(continued[:, :2], other) and continued.shape == (4, 5)


@each_class
def test_a_cache_is_continued(model_class):
    model = make_model(model_class)
    expected = model.generate(**inputs(), max_new_tokens=6, **ENDLESS)
    begun = model.generate(**inputs(), max_new_tokens=3, return_dict_in_generate=True, **ENDLESS)
    runs = []
    model.decoder.register_forward_pre_hook(lambda module, args: runs.append(args[0].shape[1]))
    continued = model.generate(
        **inputs(),
        decoder_input_ids=begun.sequences,
        decoder_attention_mask=torch.ones_like(begun.sequences),
        **{CACHE_NAME: begun[CACHE_NAME]},
        max_new_tokens=3,
        **ENDLESS,
    )
    assert torch.equal(continued, expected)
    assert runs == [1, 1, 1]  # never a token that the cache holds


@each_class
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_static_cache_changes_nothing(model_class, num_beams):
    model = make_model(model_class)
    options = {"max_new_tokens": 6, "num_beams": num_beams, "disable_compile": True}
    expected = model.generate(**inputs(), **options)
    output = model.generate(**inputs(), **options, cache_implementation="static", return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert output[CACHE_NAME].self_attention_cache.is_compileable


# ---------------------------------------------------------------------------------------------------------------------
# Beam search


@each_class
@torch.no_grad()
def test_as_many_beams_as_tokens_find_the_best_pair(model_class):
    model = make_model(model_class)
    output = model.generate(
        **inputs(),
        num_beams=VOCABULARY,
        max_new_tokens=2,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
        **ENDLESS,
    )
    first = next_token_scores(model, torch.full((4, 1), START))
    second = [next_token_scores(model, torch.tensor([[START, token]]).expand(4, -1)) for token in range(VOCABULARY)]
    scores = first[:, :, None] + torch.stack(second, dim=1)
    best = scores.flatten(1).max(dim=1)
    torch.testing.assert_close(output.sequences_scores, best.values, rtol=1e-4, atol=1e-5)
    pairs = torch.stack((best.indices // VOCABULARY, best.indices % VOCABULARY), dim=1)
    assert torch.equal(output.sequences[:, 1:], pairs)


@each_class
@torch.no_grad()
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beams_are_distinct_and_sorted_by_their_likelihood(model_class, length_penalty):
    model = make_model(model_class)
    output = model.generate(
        **inputs(),
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=4,
        length_penalty=length_penalty,
        return_dict_in_generate=True,
        output_scores=True,
        **ENDLESS,
    )
    beams, scores = output.sequences.view(4, 4, 5), output.sequences_scores.view(4, 4)
    assert all(len({tuple(beam) for beam in question.tolist()}) == 4 for question in beams)
    assert (scores.diff(dim=1) <= 0).all()
    for rank in range(4):
        likelihood = sum(
            next_token_scores(model, beams[:, rank, :step]).gather(1, beams[:, rank, step, None])[:, 0]
            for step in range(1, 5)
        )
        torch.testing.assert_close(scores[:, rank], likelihood / 4**length_penalty, rtol=1e-4, atol=1e-5)
    best = model.generate(**inputs(), num_beams=4, max_new_tokens=4, length_penalty=length_penalty, **ENDLESS)
    assert torch.equal(best, beams[:, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@each_class
def test_a_seed_repeats_a_sample(model_class):
    model = make_model(model_class)

    def sample(seed, **options):
        torch.manual_seed(seed)
        return model.generate(**inputs(), do_sample=True, max_new_tokens=6, **ENDLESS, **options)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(sample(1, num_beams=3), sample(1, num_beams=3))
    greedy = model.generate(**inputs(), max_new_tokens=6, **ENDLESS)
    assert torch.equal(sample(1, top_k=1, num_return_sequences=3), greedy.repeat_interleave(3, dim=0))


@each_class
@torch.no_grad()
def test_samples_are_as_frequent_as_they_are_likely(model_class):
    model = make_model(model_class)
    samples = model.generate(
        **inputs(), do_sample=True, top_k=0, num_return_sequences=2000, max_new_tokens=1, temperature=2.0, **ENDLESS
    )
    assert samples.shape == (8000, 2)
    expected = (next_token_scores(model, torch.full((4, 1), START)) / 2.0).softmax(dim=-1)
    counts = torch.stack([tokens.bincount(minlength=VOCABULARY) for tokens in samples[:, 1].view(4, 2000)])
    torch.testing.assert_close(counts / 2000, expected, rtol=0, atol=0.045)  # four standard deviations, at most


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and outputs


@each_class
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}])
def test_texts_that_share_an_image_are_written_as_if_each_had_its_own(model_class, options):
    model = make_model(model_class)
    results = []
    for shared in (True, False):
        batch = inputs()
        if not shared:
            batch["pixel_values"] = batch["pixel_values"][batch.pop("image_index")]
        torch.manual_seed(3)
        results.append(model.generate(**batch, max_new_tokens=6, **ENDLESS, **options))
    assert torch.equal(*results)


@each_class
def test_text_embeddings_in_place_of_ids(model_class):
    model = make_model(model_class)
    batch = inputs()
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(model.generate(**batch, max_new_tokens=4), model.generate(**inputs(), max_new_tokens=4))


@each_class
def test_all_that_can_be_returned_has_its_shape(model_class):
    output = make_model(model_class, attn_implementation="eager").generate(
        **inputs(),
        max_new_tokens=3,
        return_dict_in_generate=True,
        output_attentions=True,
        output_hidden_states=True,
        **ENDLESS,
    )

    def shapes(tensors):
        return [tuple(tensor.shape) for tensor in tensors]

    assert shapes(output.encoder_hidden_states) == [(4, 5, 24)] * 2
    assert shapes(output.encoder_attentions) == [(4, 2, 5, 5)]
    assert len(output.decoder_hidden_states) == len(output.decoder_attentions) == len(output.cross_attentions) == 3
    for step in range(3):
        assert shapes(output.decoder_hidden_states[step]) == [(4, 1, 24)] * 3
        assert shapes(output.decoder_attentions[step]) == [(4, 2, 1, step + 1)] * 2
        assert shapes(output.cross_attentions[step]) == [(4, 2, 1, 5)] * 2
    cache = output[CACHE_NAME]
    layers = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
    for layer, cross_layer in zip(*layers, strict=True):
        assert shapes((layer.keys, layer.values)) == [(4, 2, 3, 12)] * 2  # the last token has not been read
        assert shapes((cross_layer.keys, cross_layer.values)) == [(4, 2, 5, 12)] * 2


@each_class
def test_processors_of_the_scores_act(model_class):
    model = make_model(model_class)
    free = model.generate(**inputs(), max_new_tokens=6, **ENDLESS)[:, 1:]
    assert any(len(set(row)) < 6 for row in free.tolist())
    output = model.generate(**inputs(), max_new_tokens=6, no_repeat_ngram_size=1, **ENDLESS)[:, 1:]
    assert all(len(set(row)) == 6 for row in output.tolist())

    word = free[0, 2].item()
    output = model.generate(**inputs(), max_new_tokens=6, bad_words_ids=[[word]], **ENDLESS)[:, 1:]
    assert not (output == word).any()
    assert torch.equal(output[0, :2], free[0, :2])

    allowed = [[5, 6], [7, 8], [3, 4], [9, 10]]
    output = model.generate(
        **inputs(), max_new_tokens=6, prefix_allowed_tokens_fn=lambda row, written: allowed[row], **ENDLESS
    )
    assert all(set(row) <= set(tokens) for row, tokens in zip(output[:, 1:].tolist(), allowed))


@each_class
@torch.no_grad()
def test_bfloat16_writes_tokens_from_the_patches_that_forward_keeps(model_class):
    model = make_model(model_class).bfloat16()
    encoded = []
    model.get_encoder().register_forward_hook(lambda module, args, output: encoded.append(output))
    sequences = model.generate(**inputs(), max_new_tokens=6)
    assert ((sequences >= 0) & (sequences < VOCABULARY)).all()
    assert (encoded[0].last_hidden_state.dtype, len(encoded)) == (torch.bfloat16, 1)
    expected = model(**inputs(), decoder_input_ids=torch.full((4, 1), START))
    for entry, expected_entry in zip(encoded[0].selection, expected.selection, strict=True):
        assert torch.equal(entry.kept_indices, expected_entry.kept_indices)
    assert torch.equal(sequences[:, 1], expected.logits[:, -1].argmax(dim=-1))


@each_class
def test_a_checkpoint_remembers_how_to_generate(model_class, tmp_path):
    model = make_model(model_class)
    options = {"num_beams": 3, "max_new_tokens": 4, "length_penalty": 0.5}
    expected = model.generate(**inputs(), **options)
    assert not torch.equal(expected, model.generate(**inputs(), max_new_tokens=4))
    config = GenerationConfig(decoder_start_token_id=START, eos_token_id=END, pad_token_id=PAD, **options)
    assert torch.equal(model.generate(**inputs(), generation_config=config), expected)
    model.generation_config = config
    model.save_pretrained(tmp_path)
    assert torch.equal(model_class.from_pretrained(tmp_path).generate(**inputs()), expected)


@each_class
def test_the_decoder_says_what_ends_a_text_where_a_checkpoint_does_not(model_class, tmp_path):
    """A grounding checkpoint has no generation config."""
    TripsForVisualGrounding(make_model(model_class).config).save_pretrained(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    options = model_class.from_pretrained(tmp_path).generation_config
    assert (options.bos_token_id, options.eos_token_id, options.max_new_tokens) == (START, END, 10)


@each_class
def test_a_misspelt_option_is_refused(model_class):
    with pytest.raises(ValueError, match="max_new_token'"):
        make_model(model_class).generate(**inputs(), max_new_token=3)
