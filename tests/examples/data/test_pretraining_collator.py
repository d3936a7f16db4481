"""Batches of pre-training: masked words, cut captions and randomness."""

from collections import Counter

import pytest
import torch
from toy_pairs import make_rows, make_tokenizer

from modeling_trips import TripsConfig
from trips_examples.data.pretraining import PretrainingCollator
from trips_examples.training.models import make_processor


@pytest.fixture(scope="module")
def processor():
    return make_processor(make_tokenizer(), TripsConfig.from_preset("tiny"))


def test_words_are_masked_at_the_rates_of_bert_and_special_tokens_never(processor):
    tokenizer = processor.tokenizer
    changed = Counter()
    for start in range(60):
        rows = [{**row, "source": f"{start} {row['source']}"} for row in make_rows(50)]
        batch = PretrainingCollator(processor)(rows)
        ids, masked, labels = batch["input_ids"], batch["mlm_input_ids"], batch["mlm_labels"]
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        chosen = labels != -100
        assert not (chosen & special).any() and torch.equal(labels[chosen], ids[chosen])
        assert torch.equal(masked[~chosen], ids[~chosen])
        changed["words"] += int((~special).sum())
        changed["chosen"] += int(chosen.sum())
        changed["mask"] += int((masked[chosen] == tokenizer.mask_token_id).sum())
        changed["kept"] += int((masked[chosen] == ids[chosen]).sum())
    assert changed["chosen"] / changed["words"] == pytest.approx(0.15, abs=0.01)
    assert changed["mask"] / changed["chosen"] == pytest.approx(0.8, abs=0.03)
    assert changed["kept"] / changed["chosen"] == pytest.approx(0.1, abs=0.03)  # some random words equal the original


def test_what_is_drawn_depends_on_the_seed_and_the_rows_alone(processor):
    rows = make_rows(20)
    batches = []
    for seed, order in ((0, rows), (0, rows), (1, rows), (0, rows[::-1])):
        torch.manual_seed(len(batches))
        before = torch.get_rng_state()
        batches.append(PretrainingCollator(processor, seed=seed)(order))
        assert torch.equal(torch.get_rng_state(), before)  # training draws from it
    for name in ("mlm_input_ids", "labels", "pixel_values"):
        assert torch.equal(batches[0][name], batches[1][name])
    assert not torch.equal(batches[0]["mlm_labels"], batches[2]["mlm_labels"])
    assert not torch.equal(batches[0]["mlm_labels"], batches[3]["mlm_labels"].flip(0))


def test_a_cut_caption_is_a_prompt_and_what_follows(processor):
    tokenizer = processor.tokenizer
    cuts = Counter()
    for start in range(20):
        rows = [{**row, "source": f"{start} {row['source']}"} for row in make_rows(30)] + make_rows(1, "a {}")
        batch = PretrainingCollator(processor)(rows)
        for ids, prompt, mask, labels in zip(
            batch["input_ids"], batch["prompt_input_ids"], batch["prompt_attention_mask"], batch["labels"]
        ):
            whole = tokenizer.decode(ids, skip_special_tokens=True).split()
            prompt, labels = prompt[mask.bool()].tolist(), labels[labels != -100].tolist()
            assert prompt == tokenizer(tokenizer.decode(prompt, skip_special_tokens=True))["input_ids"]
            assert labels[-1] == tokenizer.sep_token_id
            beginning, rest = tokenizer.decode(prompt[1:-1]).split(), tokenizer.decode(labels[:-1]).split()
            assert beginning and rest and beginning + rest == whole
            cuts[len(whole), len(beginning)] += 1
    # "red from the left to the right" has seven words: every cut happens, about as often.
    assert {cut for length, cut in cuts if length == 7} == set(range(1, 7))
    assert min(cuts[7, cut] for cut in range(1, 7)) > 60 and cuts[2, 1] == 20


def test_a_caption_of_one_word_is_not_cut(processor):
    batch = PretrainingCollator(processor)(make_rows(2, "{}") + make_rows(1))
    assert (batch["labels"][:2] == -100).all() and (batch["labels"][2] != -100).any()
    assert torch.equal(batch["prompt_input_ids"][:2, :3], batch["input_ids"][:2, :3])
