"""Files of predictions that an evaluation writes."""

import json

import pytest
from datasets import Dataset, Image, List
from json_files import read_json

from trips_examples.training.files import write_predictions


def test_predictions_are_written_with_columns_and_image(tmp_path):
    columns = {
        "answers": [["é"], []],
        "source": ["row 1", "row 2"],
        "image_id": ["a", "b"],
        "image": [{"path": "a.png", "bytes": None}, {"path": None, "bytes": b"png"}],
    }
    rows = Dataset.from_dict(columns).cast_column("image", Image())
    write_predictions(tmp_path, rows, ["source", "answers"], [{"prediction": "a"}, {"prediction": "b"}])
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"source": "row 1", "answers": ["é"], "image": "a.png", "prediction": "a"}'
    assert json.loads(lines[1]) == {"source": "row 2", "answers": [], "image": "b", "prediction": "b"}
    with pytest.raises(ValueError):  # numbers of rows and predictions differ
        write_predictions(tmp_path, rows, ["source"], [{"prediction": "a"}])


def test_both_images_of_a_statement_are_named(tmp_path):
    pair = [{"path": "left.png", "bytes": None}, {"path": None, "bytes": b"png"}]
    rows = Dataset.from_dict({"images": [pair], "image_ids": [["l", "r"]], "label": [1]})
    rows = rows.cast_column("images", List(Image()))
    write_predictions(tmp_path, rows, ["label"], [{"prediction": 1}])
    line = read_json(tmp_path / "predictions.jsonl")
    assert line == {"label": 1, "images": ["left.png", "r"], "prediction": 1}
