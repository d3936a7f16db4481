"""Accuracy and time of one model are of the same questions."""

import one_model
import pytest
from json_files import read_json


def test_the_shipped_model_answers_with_one_patch_what_the_unpruned_one_does(tmp_path):
    path = tmp_path / "rows.json"
    one_model.main(["--test_scenes=2", "--texts_per_image=4", "--schedule=2:text:0.005", f"--output_json={path}"])
    unpruned, pruned = read_json(path)
    assert unpruned["patches"] == 144
    assert pruned["patches"] == 1
    for row in (unpruned, pruned):
        assert row["questions"] == 16
        assert row["accuracy"] >= 15 / 16
        assert row["time_ratio"] == pytest.approx(row["seconds"] / unpruned["seconds"])
    assert pruned["macs_ratio"] < unpruned["macs_ratio"] == 1.0
