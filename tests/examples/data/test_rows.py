"""Rows before they are batches: texts that are too long are found, images come once."""

import pytest
from datasets import Dataset, DatasetDict

from modeling_trips import TripsConfig
from trips_examples.data.rows import images_of, without_long_texts
from trips_examples.data.vocabulary import train_wordpiece_tokenizer
from trips_examples.training.models import make_processor


@pytest.fixture(scope="module")
def processor():
    return make_processor(train_wordpiece_tokenizer(["is it red?"]), TripsConfig.from_preset("tiny"))


def test_questions_that_do_not_fit_are_found_before_training(processor, caplog):
    questions = ["is it red?", "red " * 62, "red " * 63]  # 64 tokens fit, with [CLS] and [SEP]
    rows = Dataset.from_dict({"question": questions, "source": ["a row 1", "a row 2", "a row 3"]})
    data = DatasetDict(train=rows.select([0]), validation=rows)
    with pytest.raises(ValueError, match=r"1 of 3 questions .* 64 tokens: a row 3 \(65 tokens\)"):
        without_long_texts(data, "question", processor, skip=False)
    kept = without_long_texts(data, "question", processor, skip=True)
    assert kept["train"]["source"] == ["a row 1"] and kept["validation"]["source"] == ["a row 1", "a row 2"]
    assert "1 of 3 questions" in caplog.text


def test_images_of_captions_come_once():
    rows, image_of_text = images_of(Dataset.from_dict({"image_id": ["b", "a", "b", "c", "a"]}))
    assert rows == [0, 1, 3] and image_of_text.tolist() == [0, 1, 0, 2, 1]
