"""Batches of pre-training: masked words, cut captions and randomness."""

from collections import Counter

import pytest
import torch
from toy_pairs import make_rows

from trips_examples.data.collators import PretrainingCollator


def test_words_are_masked_at_the_rates_of_bert_and_special_tokens_never(processor):
    tokenizer = processor.tokenizer
    rows = make_rows(3000)
    batch = PretrainingCollator(processor)(rows)
    ids = batch["input_ids"]
    labels = batch["mlm_labels"]
    is_special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    is_chosen = labels != -100
    assert not (is_chosen & is_special).any()
    assert torch.equal(labels[is_chosen], ids[is_chosen])
    assert torch.equal(batch["mlm_input_ids"][~is_chosen], ids[~is_chosen])
    chosen = batch["mlm_input_ids"][is_chosen]
    assert is_chosen[~is_special].float().mean() == pytest.approx(0.15, abs=0.01)
    assert (chosen == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.03)
    assert (chosen == ids[is_chosen]).float().mean() == pytest.approx(0.1, abs=0.03)  # a random word may be the same


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
    rows = make_rows(600)
    batch = PretrainingCollator(processor)(rows + make_rows(1, "a {} picture of a wall on the left"))
    mask = batch["attention_mask"].bool()
    prompt_mask = batch["prompt_attention_mask"].bool()
    cuts = Counter()
    for row in range(len(rows)):
        caption = batch["input_ids"][row, mask[row]].tolist()
        prompt = batch["prompt_input_ids"][row, prompt_mask[row]].tolist()
        labels = batch["labels"][row]
        rest = labels[labels != -100].tolist()  # ends with [SEP]
        assert prompt[:-1] + rest == caption
        beginning = tokenizer.decode(prompt, skip_special_tokens=True)
        assert prompt == tokenizer(beginning)["input_ids"]
        cuts[len(beginning.split())] += 1
    # "red from the left to the right" has seven words: every cut happens, about as often.
    assert set(cuts) == {1, 2, 3, 4, 5, 6}
    assert min(cuts.values()) > 60


def test_a_caption_of_one_word_is_not_cut(processor):
    batch = PretrainingCollator(processor)(make_rows(2, "{}") + make_rows(1, "a {}"))
    assert (batch["labels"][:2] == -100).all()
    assert torch.equal(batch["prompt_input_ids"][:2, :3], batch["input_ids"][:2, :3])
    assert (batch["labels"][2] != -100).any()
