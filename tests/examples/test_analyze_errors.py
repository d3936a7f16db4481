"""`examples/analyze_errors.py` on predictions and on checkpoints."""

import json

import PIL.Image
import pytest

from trips_examples import analyze_errors
from trips_examples.ask import CHECKPOINT


def write_predictions(folder, wrong: set[int], regions: str | None = None) -> str:
    """Write predictions of 40 questions, half of them about colors, some of them wrong."""
    rows = (
        {
            "source": f"rows.jsonl row {number}",
            "question": f"what is number {number}?",
            "answers": ["red"],
            "kind": "color" if number < 20 else "shape",
            "prediction": "blue" if number in wrong else "red",
        }
        for number in range(40)
    )
    folder.mkdir()
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if regions:
        (folder / "eval_results.json").write_text(json.dumps({"regions_used_for": regions}))
    return str(folder / "predictions.jsonl")


def test_two_files_of_predictions(tmp_path):
    model = write_predictions(tmp_path / "a", {*range(12), 30}, regions="selection loss")
    other = write_predictions(tmp_path / "b", {35})
    overall, _ = analyze_errors.main(["--model", model, "--other", other, "--output_dir", str(tmp_path / "errors")])
    assert (overall.lost, overall.won) == (13, 1)
    written = json.loads((tmp_path / "errors/errors.json").read_text())
    assert [entry["regions_used_for"] for entry in written["models"]] == ["selection loss", "unknown"]
    assert (written["groups"][0]["feature"], written["groups"][0]["value"]) == ("kind", "color")
    assert len(written["changed"]) == 14
    assert PIL.Image.open(tmp_path / "errors/errors.png").width > 500


def test_a_file_without_another_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--other"):
        analyze_errors.main(["--model", str(tmp_path / "predictions.jsonl")])


def test_a_checkpoint_is_compared_with_itself_on_data_with_a_bad_row(tmp_path):
    PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    row = {"question": "what color is the circle?", "answer": "red"}
    for split in ("train", "val"):
        rows = [{**row, "image": f"{name}.png"} for name in ("good", "bad")]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        "--model",
        str(CHECKPOINT),
        "--output_dir",
        str(tmp_path / "errors"),
        "--skip_bad_rows",
        "--min_count=1",
    ]
    data = ["--train_file", str(tmp_path / "train.jsonl"), "--validation_file", str(tmp_path / "val.jsonl")]
    overall, groups = analyze_errors.main([*options, *data])
    assert overall.count == 1 and {group.feature for group in groups} == {"first words", "answer", "words"}
