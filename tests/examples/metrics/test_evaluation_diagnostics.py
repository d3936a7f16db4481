"""Texts that a model cannot write, references as it writes them, collapsed models, and accuracy by group."""

import logging

import pytest
from datasets import Dataset, DatasetDict
from tiny_processors import make_bert_tokenizer

from modeling_trips import TripsProcessor
from trips_examples.data.vocabulary import train_tokenizer
from trips_examples.metrics.diagnostics import (
    accuracy_by_group,
    groups_of,
    measurable_answers,
    most_tokens,
    unwritable_texts,
    variety,
    warn_of_unwritable_texts,
    written_texts,
)
from trips_examples.metrics.grounding_accuracy import GroundingAccuracy
from trips_examples.metrics.vqa_accuracy import VqaAccuracy, normalize_answer


ANSWERS = ["café", "50%", "$5", "c#", "红色", "u.s.a.", "tea", "10:30", "zebra"]


@pytest.fixture
def bert():
    """Return a processor with a tokenizer as BERT's (uncased), which knows no zebra."""
    return TripsProcessor(tokenizer=make_bert_tokenizer(ANSWERS[:-1]))


def test_right_tokens_are_right_answers_with_every_tokenizer(bert):
    metric = VqaAccuracy()
    own = TripsProcessor(tokenizer=train_tokenizer(ANSWERS))
    for processor, unknown in ((bert, "zebra"), (own, None)):
        for answer in ANSWERS:
            ids = processor.tokenizer([answer], add_special_tokens=False)["input_ids"]
            predictions = processor.post_process_answers(ids)
            references = measurable_answers([[answer]], processor)
            score = metric.compute(predictions=predictions, references=references)["accuracy"]
            assert score == float(answer != unknown)


def test_answers_of_several_annotators_are_compared_as_they_are(bert):
    assert measurable_answers([["café"], ["café", "café"]], bert) == [["cafe"], ["café", "café"]]


def test_texts_that_the_model_cannot_write_are_counted_before_the_training(bert, caplog):
    data = DatasetDict(
        train=Dataset.from_dict({"answers": [["café", "tea"], ["café"], ["$5"], ["zebra"]]}),
        validation=Dataset.from_dict({"answers": [["tea"], ["zebra", "zebra"]]}),
        test=Dataset.from_dict({"answers": [["tea"]]}),
    )
    counts = warn_of_unwritable_texts(data, "answers", bert, normalize_answer)
    assert counts == {"train": 4, "validation": 2, "test": 0}
    train, validation, remedy = [record.message for record in caplog.records]
    assert "4 of the 5 answers" in train and "'zebra'" in train
    assert "2 of the 3 answers" in validation
    assert "--text_model_name_or_path" in remedy
    assert written_texts(["zebra", "$5", "zebra"], bert) == {"zebra": None, "$5": "$ 5"}
    own = TripsProcessor(tokenizer=train_tokenizer(ANSWERS))
    counts, sentences = unwritable_texts(data, "answers", own, normalize_answer)
    assert counts == {"train": 0, "validation": 0, "test": 0}
    assert not sentences
    assert most_tokens(data, "answers", bert) == 3  # $ 5 [SEP]


def test_a_text_in_a_hundred_needs_no_other_model(bert):
    data = DatasetDict(train=Dataset.from_dict({"answers": [["tea"]] * 99 + [["café"]]}))
    counts, sentences = unwritable_texts(data, "answers", bert, normalize_answer)
    assert counts == {"train": 1}
    assert len(sentences) == 1


VARIETY = ("different_predictions", "most_frequent_share", "accuracy_majority", "collapsed")


@pytest.mark.parametrize(
    "predictions, truths, expected",
    [
        (["red"] * 19 + ["blue"], ["red"] * 10 + ["blue"] * 10, (2, 0.95, 0.5, 1)),
        (["no"] * 20, ["no"] * 20, (1, 1.0, 1.0, 0)),  # there is nothing else to say
        (["no"] * 19 + ["yes"], ["no"] * 19 + ["yes"], (2, 0.95, 0.95, 0)),
        (["red", "blue"] * 10, ["green"] * 20, (2, 0.5, 1.0, 0)),
        ([1] * 4, [1, 0, 0, 1], (1, 1.0, 0.5, 1)),
    ],
)
def test_a_collapsed_model_is_named(predictions, truths, expected, caplog):
    with caplog.at_level(logging.INFO):
        metrics = variety(predictions, truths, "answer", lambda answers: truths.count(answers[0]) / len(truths))
    assert metrics == dict(zip(VARIETY, expected))
    assert any(record.levelno == logging.WARNING for record in caplog.records) == metrics["collapsed"]
    assert "accuracy_majority" not in variety(predictions, truths, "caption")


BOXES = [[0, 0, 9, 9], [0, 0, 12, 1], [5, 5, 10, 10], [0, 0, 2, 1]]
KINDS = ["name", "size", "name", "place"]


def test_boxes_by_kind():
    rows = Dataset.from_dict({"kind": KINDS, "box": BOXES})
    wrong = [50, 50, 60, 60]
    found = [BOXES[0], BOXES[1], wrong, wrong]
    assert accuracy_by_group(GroundingAccuracy(), found, rows["box"], rows) == {
        "accuracy_name": 0.5,
        "accuracy_place": 0.0,
        "accuracy_size": 1.0,
    }


def test_answers_by_kind():
    """Rows of no kind are in no group of kinds."""
    rows = Dataset.from_dict({"kind": [*KINDS[:3], None], "region": [BOXES[0], None, BOXES[2], None]})
    assert groups_of(rows) == {"name": [0, 2], "size": [1]}
    references = [["owl"], ["yes"], ["cat"], ["2"]]
    assert accuracy_by_group(VqaAccuracy(), ["owl", "no", "bat", "2"], references, rows) == {
        "accuracy_name": 0.5,
        "accuracy_size": 0.0,
    }
    assert groups_of(Dataset.from_dict({"kind": [None] * 4, "region": [None] * 4})) == {}
