"""`examples/analyze_errors.py` on predictions and on checkpoints."""

import json

import pytest
from markupsafe import escape

from trips_examples import analyze_errors
from trips_examples.analysis import SAME_WEIGHTS, SAME_WEIGHTS_NOTE
from trips_examples.ask import CHECKPOINT


def write_predictions(path, wrong: set[int]):
    """Write predictions of 40 questions, half of them about colors, some of them wrong."""
    path.parent.mkdir()
    rows = (
        {
            "source": f"rows.jsonl row {number}",
            "question": f"<what> is number {number}?",
            "answers": ["red"],
            "kind": "color" if number < 20 else "shape",
            "prediction": "blue" if number in wrong else "red",
        }
        for number in range(40)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_two_files_of_predictions(tmp_path, capsys):
    model = write_predictions(tmp_path / "a/predictions.jsonl", wrong={*range(12), 30})
    other = write_predictions(tmp_path / "b/predictions.jsonl", wrong={35})
    options = ["--model", model, "--other", other, "--output_dir", str(tmp_path / "errors")]
    result = analyze_errors.main(options)
    assert (result.overall.lost, result.overall.won) == (13, 1)
    assert "13 items are lost and 1 won: it is worse by more than chance (p = 0.002)" in capsys.readouterr().out
    assert "note" not in json.loads((tmp_path / "errors/errors.json").read_text())

    written = json.loads((tmp_path / "errors/errors.json").read_text())
    assert (written["groups"][0]["feature"], written["groups"][0]["value"]) == ("kind", "color")
    assert len(written["changed"]) == 14 and written["overall"]["difference"] == pytest.approx(-12 / 40)
    page = (tmp_path / "errors/errors.html").read_text()
    assert "&lt;what&gt; is number 3?" in page and "<what>" not in page
    assert "src=" not in page and "href=" not in page  # it stands alone


def test_a_file_alone_and_a_missing_file_are_refused(tmp_path):
    path = str(tmp_path / "predictions.jsonl")
    for options, message in ((["--model", path], "--other"), (["--model", path, "--other", path], "predictions")):
        with pytest.raises(SystemExit, match=message):
            analyze_errors.main(options)


@pytest.mark.parametrize("seed", [[], ["--seed", "7"]])
def test_scenes_are_those_that_the_script_evaluates(seed, tmp_path):
    """The loss at a low keep rate is grouped by kind, size and place, and the page shows the kept patches."""
    options = ["--model", str(CHECKPOINT), "--output_dir", str(tmp_path / "errors"), "--num_pictures", "1"]
    data = ["--dataset_name", "easy_vqa_scenes", "--train_scenes", "1", "--validation_scenes", "20", *seed]
    selection = ["--keep_rate", "0.02", "--selection_guidance", "random"]
    result = analyze_errors.main([*options, *data, "--health_steps", "0", *selection])
    features = {group.feature for group in result.groups}
    assert {"kind", "answer", "place in the image", "size, as a share of the image"} <= features
    places = [group for group in result.groups if group.feature == "place in the image"]
    assert sum(group.count for group in places) > 0.5 * len(result.items)
    assert result.overall.accuracy < 0.8 < result.overall.other_accuracy and result.overall.p_value < 0.001
    page = (tmp_path / "errors/errors.html").read_text()
    assert "data:image/png;base64," in page and "layer 2: 2 patches" in page
    written = json.loads((tmp_path / "errors/errors.json").read_text())
    assert (written["other"], written["note"]) == (SAME_WEIGHTS, SAME_WEIGHTS_NOTE)
    assert str(escape(SAME_WEIGHTS_NOTE)) in page and "unpruned:" not in page
