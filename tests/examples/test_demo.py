"""`examples/demo.py` from one end to the other, with a model that has hardly been trained."""

import PIL.Image
import pytest

from trips_examples import demo


@pytest.mark.slow
def test_demo_answers_draws_and_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    demo.main(["--max_steps", "3", "--max_train_samples", "512", "--max_eval_samples", "64"])
    printed = capsys.readouterr().out
    assert printed.count("image 0: ") == 4
    assert "Accuracy on easy-VQA's test split: " in printed
    assert "one question per image: " in printed and "0.66 of its multiply-accumulates" in printed
    assert "four questions that share their image: " in printed
    # One row of panels per selection layer: the picture shows the original and two questions.
    with PIL.Image.open(tmp_path / "demo/kept_patches.png") as picture:
        assert picture.width > 600 and len(picture.convert("RGB").getcolors(10**6)) > 20
