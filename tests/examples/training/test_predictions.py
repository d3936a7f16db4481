"""Files of predictions that an evaluation writes."""

import json

import numpy as np
import pytest
from datasets import Dataset

from modeling_trips import TripsConfig
from trips_examples.data.vocabulary import train_wordpiece_tokenizer
from trips_examples.training.models import make_processor
from trips_examples.training.predictions import texts_of, write_predictions


def test_predictions_are_written_with_columns(tmp_path):
    rows = Dataset.from_list(
        [{"answers": ["é"], "source": "row 1", "image": 0}, {"answers": [], "source": "row 2", "image": 0}]
    )
    write_predictions(tmp_path, rows, ["source", "answers"], ({"prediction": text} for text in "ab"))
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"source": "row 1", "answers": ["é"], "prediction": "a"}'
    assert json.loads(lines[1])["prediction"] == "b"
    with pytest.raises(ValueError):  # numbers of rows and predictions differ
        write_predictions(tmp_path, rows, ["source"], [{"prediction": "a"}])


def test_padding_tokens_are_not_decoded():
    processor = make_processor(train_wordpiece_tokenizer(["red blue"]), TripsConfig.from_preset("tiny"))
    red, blue = processor.tokenizer.convert_tokens_to_ids(["▁red", "▁blue"])
    assert texts_of(np.array([[red, blue], [blue, -100]]), processor) == ["red blue", "blue"]
