"""Training of every task on composed scenes of named images, and drawings of kept patches."""

import json

import numpy as np
import PIL.Image
import pytest
from named_pictures import write_pictures
from toy_tasks import OPTIONS

from trips_examples import run_captioning, run_grounding, run_nlvr2, run_retrieval, run_vqa


SCENES = ["--train_scenes=6", "--validation_scenes=4", "--scene_size=64", "--validation_names=0.4", "--max_steps=1"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    return f"--pictures={write_pictures(tmp_path_factory.mktemp('pictures'))}"


def train(script, pictures: str, folder, *options: str) -> dict[str, float]:
    data = ["--dataset_name=picture_scenes", pictures, *SCENES]
    return script.main([*data, *OPTIONS, *options, f"--output_dir={folder}"])


@pytest.mark.parametrize(
    ("script", "metric"),
    [
        (run_vqa, "eval_accuracy_presence"),
        (run_captioning, "eval_bleu_4"),
        (run_nlvr2, "eval_accuracy"),
        (run_retrieval, "eval_t2i_r1"),
    ],
    ids=["vqa", "captions", "nlvr2", "retrieval"],
)
def test_every_task_trains_on_scenes(script, metric, pictures, tmp_path):
    assert 0 <= train(script, pictures, tmp_path)[metric] <= 1


def test_what_a_trained_model_keeps_of_scenes_is_drawn(pictures, tmp_path):
    faded = {}
    for rate in ("0.25", "1.0"):
        metrics = train(run_grounding, pictures, tmp_path / rate, f"--keep_rate={rate}", "--num_pictures=4")
        with PIL.Image.open(tmp_path / rate / "predictions.png") as image:
            assert image.size == (4 * 250, 270)
            faded[rate] = np.asarray(image.convert("L"), dtype=float).mean()
        assert {"eval_accuracy_name", "eval_accuracy_smallest"} <= metrics.keys()
        assert ("eval_layer3_patch_precision" in metrics) == (rate == "0.25")
    assert faded["0.25"] > faded["1.0"] + 20  # dropped patches fade to white


def test_pictures_alone_are_found_by_their_names(pictures, tmp_path):
    data = ["--dataset_name=pictures", pictures, "--scene_size=64", "--validation_names=0.4"]
    metrics = run_retrieval.main([*data, *OPTIONS, "--max_steps=1", f"--output_dir={tmp_path}"])
    found = [json.loads(line) for line in (tmp_path / "found_images.jsonl").read_text().splitlines()]
    assert metrics["eval_samples"] == metrics["eval_images"] == len(found) > 1
