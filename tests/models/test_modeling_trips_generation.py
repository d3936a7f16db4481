"""`generate`, which all classes that write inherit: greedy search, caches, shared images and saved options."""

import torch
from tiny_models import each_generator
from tiny_question_answering import END, PAD, START, VOCABULARY, inputs, make_config

from modeling_trips import TripsForConditionalGeneration, TripsForVisualGrounding
from modeling_trips.modeling_trips_text import CACHE_NAME


ENDLESS = {"eos_token_id": VOCABULARY + 1}  # an end token that no text can have


def make_model():
    """Return a model whose texts differ between questions and tokens. Two of four texts end with the end token."""
    torch.manual_seed(61)
    config = make_config()
    config.tie_word_embeddings = config.decoder_config.tie_word_embeddings = False
    model = TripsForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.decoder.named_parameters():
            if name.endswith("output.dense.weight"):
                weight.mul_(0.3)  # otherwise the question dominates the generated tokens
    return model


def next_token_scores(model, written):
    """Return the log-probabilities of the token after each row of `written`, without a cache."""
    return model(**inputs(), decoder_input_ids=written, use_cache=False).logits[:, -1].log_softmax(dim=-1)


@torch.no_grad()
def test_greedy_search_writes_the_likeliest_token_and_says_how_likely():
    model = make_model()
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


@each_generator
@torch.no_grad()
def test_caches_rows_and_beams_agree(case):
    """As the tests of `GenerationTesterMixin` ask, which Transformers' source distribution lacks."""
    model = case.make_model()
    batch = case.make_inputs()
    batch.pop("decoder_input_ids")

    def generate(batch=batch, **options):
        return model.generate(**batch, max_new_tokens=5, min_new_tokens=5, **options)

    for options in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        expected = generate(**options)
        assert torch.equal(generate(use_cache=False, **options), expected)
        assert torch.equal(generate(cache_implementation="static", **options), expected)
        last_row = {name: tensor[-1:] for name, tensor in batch.items()}
        assert torch.equal(generate(last_row, **options), expected[-options.get("num_return_sequences", 1) :])
    sampled = []
    for _ in range(2):
        torch.manual_seed(0)
        sampled.append(generate(do_sample=True, num_return_sequences=3))
    assert sampled[0].shape == (12, 6)
    assert torch.equal(*sampled)


def test_a_cache_is_continued():
    model = make_model()
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


def test_the_decoder_says_what_ends_a_text_where_a_checkpoint_does_not(tmp_path):
    """A grounding checkpoint has no generation config."""
    TripsForVisualGrounding(make_model().config).save_pretrained(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    options = TripsForConditionalGeneration.from_pretrained(tmp_path).generation_config
    assert (options.bos_token_id, options.eos_token_id, options.max_new_tokens) == (START, END, 12)
