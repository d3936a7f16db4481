"""Checks of a split's texts against a tokenizer."""

import pytest
from datasets import Dataset, DatasetDict

from modeling_trips import TripsConfig
from trips_examples.data.texts import with_fitting_texts
from trips_examples.data.vocabulary import train_wordpiece_tokenizer
from trips_examples.training.models import make_processor


@pytest.fixture(scope="module")
def processor():
    words = "what color is it ? is it red ? what shape red yes no circle".split()
    return make_processor(train_wordpiece_tokenizer(words), TripsConfig.from_preset("tiny"))


def test_texts_that_do_not_fit_are_found_before_training(processor, caplog):
    questions = ["is it red?", "red " * 62, "red " * 63, "\ufffd", "red"]  # 64 tokens fit, with [CLS] and [SEP]
    answers = [["yes"], ["red"], ["red"], ["red"], ["red", "no " * 64]]  # with [SEP]
    sources = [f"a row {number}" for number in range(1, 6)]
    rows = Dataset.from_dict({"question": questions, "answers": answers, "source": sources})
    data = DatasetDict(train=rows.select([0]), validation=rows)
    with pytest.raises(ValueError, match="3 of the 5 rows of validation cannot be used") as raised:
        with_fitting_texts(data, "vqa", processor, skip=False)
    assert str(raised.value).splitlines()[1:4] == [
        "  a row 3: more than 64 tokens (question has 65)",
        "  a row 4: question without tokens (the tokenizer knows none of its characters)",
        "  a row 5: more than 64 tokens (answers has 65)",
    ]
    kept = with_fitting_texts(data, "vqa", processor, skip=True)
    assert kept["train"]["source"][:] == ["a row 1"] and kept["validation"]["source"][:] == ["a row 1", "a row 2"]
    assert "Skipped 3 of the 5 rows of validation (more than 64 tokens: 2, question without tokens: 1)" in caplog.text


def test_words_that_the_tokenizer_does_not_know_are_told(processor, caplog):
    """Models cannot learn such an answer: it is [UNK], which decodes to an empty text."""
    answers = [["red", "\u2603"], ["\u2603"], ["q\u2603"]]
    rows = Dataset.from_dict({"question": ["is it red?"] * 3, "answers": answers, "source": ["a", "b", "c"]})
    assert len(with_fitting_texts(DatasetDict(train=rows), "vqa", processor, skip=False)["train"]) == 3
    told = "train: 2 different answers hold words that the tokenizer does not know, e.g. '\u2603', 'q\u2603'."
    assert [record.message for record in caplog.records] == [told]
