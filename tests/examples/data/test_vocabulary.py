"""Training of a tokenizer on texts."""

import unicodedata

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from modeling_trips import TripsProcessor
from trips_examples.data.vocabulary import BUNDLED_WORDS, train_tokenizer
from trips_examples.training.options import DataArguments


TEXTS = ["What shape is the red shape?", "what color is the circle?", "is there a teal triangle?", "Café"] * 2
# Signs, scripts with and without spaces, combining marks, special tokens as text.
WRITTEN = [
    *("café", "Zürich", "İstanbul", "ẞtraße", "æther", "x\u0301", "ﬁsh", "½", "ＡＢ", "😀", "’s", "\u202ered"),
    *("红色", "赤い", "빨강", "नमस्ते", "สวัสดี", "שלום", "一只红色的猫 在桌子上"),
    *("$5", "50%", "C#", "C++", "u.s.a.", "mr. x", "3.14", "1,000", "10:30", "10 - 5", "a/b", "(left)", "@home"),
    *("t-shirt", "don't", "rock 'n' roll", "5 o'clock", "yes.", "no!", "-", "...", "a  b", "a\u00a0b"),
    *("[SEP]", "[PAD]", "[CLS] red"),
]


def test_a_text_is_decoded_as_it_was_written(tmp_path):
    """Also by a tokenizer that is saved and loaded, and in generated sequences with special tokens."""
    train_tokenizer(WRITTEN).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    processor = TripsProcessor(tokenizer=tokenizer)
    sequences = tokenizer(WRITTEN, padding=True)["input_ids"]
    assert processor.post_process_answers(sequences) == WRITTEN
    labels = processor.encode_answers(WRITTEN)
    assert processor.post_process_answers(labels.clamp(min=0)) == WRITTEN
    assert len({tuple(row) for row in labels.tolist()}) == len(WRITTEN)  # texts that differ in a sign do differ
    decomposed = unicodedata.normalize("NFD", "café")
    assert tokenizer(decomposed)["input_ids"] == tokenizer("café")["input_ids"]


def test_words_are_tokens():
    tokenizer = train_tokenizer(TEXTS, vocab_size=80)
    assert len(train_tokenizer(TEXTS, vocab_size=60)) == 60 < len(tokenizer) <= 80
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert set(tokenizer.all_special_tokens) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    assert tokenizer.pad_token_id == 0
    ids = tokenizer("What is the Café?")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.unk_token_id not in ids
    assert len(tokenizer.tokenize("the circle?")) == 3
    assert tokenizer.tokenize("xyz") == ["▁", "[UNK]"]
    assert {len(train_tokenizer(BUNDLED_WORDS).tokenize(word)) for word in BUNDLED_WORDS} == {1}


def test_texts_in_lower_case_make_a_tokenizer_without_case():
    data = {"train": Dataset.from_dict({"question": ["what color is it?"]})}
    tokenizer = train_tokenizer(DataArguments(train_file="rows.jsonl").vocabulary(data, "question"))
    assert tokenizer.tokenize("What COLOR is it?") == tokenizer.tokenize("what color is it?")
    assert "[UNK]" not in tokenizer.tokenize("WHAT is it?")


def test_equal_texts_make_an_equal_vocabulary():
    first, again = (train_tokenizer(texts, 80).get_vocab() for texts in (TEXTS, TEXTS[::-1]))
    assert first == again


def test_tokenizer_of_nothing():
    with pytest.raises(ValueError, match="2 texts"):
        train_tokenizer(["", " "])
