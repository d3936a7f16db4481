"""Training of a tokenizer on texts."""

import subprocess
import sys

import pytest

from trips_examples.data.vocabulary import train_wordpiece_tokenizer


TEXTS = ["What shape is the red shape?", "what color is the circle?", "is there a teal triangle?", "Café"] * 2


def test_tokenizer_is_that_of_bert():
    tokenizer = train_wordpiece_tokenizer(TEXTS, vocab_size=80)
    assert len(train_wordpiece_tokenizer(TEXTS, vocab_size=60)) == 60 < len(tokenizer) <= 80
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.pad_token_id == 0
    ids = tokenizer("WHAT is the cafe?")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "what is the cafe?"
    assert tokenizer.tokenize("the") == ["the"]
    assert tokenizer.tokenize("xyz") == ["[UNK]"]
    assert set(tokenizer.all_special_tokens) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}


def test_tokenizer_vocabulary_is_the_same_in_each_process():
    code = f"""
import sys
sys.path[:0] = {sys.path}
from trips_examples.data.vocabulary import train_wordpiece_tokenizer
print(sorted(train_wordpiece_tokenizer({TEXTS}, 80).get_vocab().items()))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == str(sorted(train_wordpiece_tokenizer(TEXTS, 80).get_vocab().items()))


def test_tokenizer_of_nothing():
    with pytest.raises(ValueError, match="2 texts"):
        train_wordpiece_tokenizer(["", " "])
