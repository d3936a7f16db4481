"""The processor's text cleaning, as in ALBEF: a saved field, for questions and captions but not for answers."""

import json

import pytest
from transformers import AutoProcessor

from modeling_trips import TripsProcessor
from modeling_trips.processing_trips import clean_caption, clean_question
from trips_examples.data.vocabulary import train_wordpiece_tokenizer


TEXT = "What's a <Person>'s t-shirt [MASK], (2.5/3)?"
QUESTION = "Whats a <Person>s t shirt [MASK] 25 3"
CAPTION = "Whats a persons t shirt [MASK] 25 3"


@pytest.fixture
def tokenizer():
    return train_wordpiece_tokenizer([TEXT, QUESTION, CAPTION])


def test_by_hand():
    assert clean_question(TEXT) == QUESTION
    assert clean_caption(TEXT) == CAPTION
    assert clean_question("""a,b.c'd!e?f"g(h)i*j#k:l;m~n""") == "abcdefghijklmn"
    assert clean_question("& $5 a_b @ é") == "& $5 a_b @ é"


@pytest.mark.parametrize(
    ("text_cleaning", "expected"), [(None, TEXT), ("albef_question", QUESTION), ("albef_caption", CAPTION)]
)
def test_texts_are_cleaned_and_answers_are_not(tokenizer, tmp_path, text_cleaning, expected):
    processor = TripsProcessor(tokenizer=tokenizer, text_cleaning=text_cleaning)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["text_cleaning"] == text_cleaning
    for one in (processor, TripsProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        ids = tokenizer(expected)["input_ids"]
        assert one(text=TEXT)["input_ids"] == ids and tokenizer.mask_token_id in ids
        assert one(text=[TEXT, "a"])["input_ids"][0] == ids
        assert one.encode_answers([TEXT])[0, :-1].tolist() == tokenizer(TEXT, add_special_tokens=False)["input_ids"]


def test_cleanings_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="text_cleaning"):
        TripsProcessor(text_cleaning="albef")
