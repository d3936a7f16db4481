"""`examples/run_vqa.py` on a toy data set: results, resuming after a kill, and losses that are not finite."""

import re
import subprocess
import sys

import pytest
import torch
from json_files import read_json
from loading import read, write
from PIL import Image
from places import HELPERS
from safetensors.torch import load_file
from tiny_processors import make_bert_tokenizer
from toy_pairs import TWO_PROCESSES
from toy_tasks import ENVIRONMENT, OPTIONS, predictions

from modeling_trips import (
    TripsConfig,
    TripsForQuestionAnswering,
    TripsProcessor,
    TripsVisualQuestionAnsweringPipeline,
)
from trips_examples import run_vqa


COLORS = ["red", "blue", "green", "white"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a folder with two files: 4 images with 3 training questions each, 2 of them for validation."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for color in COLORS:
        image = f"{color}.png"
        Image.new("RGB", (64, 64), color).save(folder / image)
        rows.append({"image": image, "question": "what color is it?", "answers": [color] * 9 + ["other"]})
        for other in ("red", "blue"):
            answer = "yes" if color == other else "no"
            rows.append({"image": image, "question": f"is it {other}?", "answer": answer})
    write(folder / "train.jsonl", rows)
    write(folder / "validation.jsonl", [row for row in rows if row["question"] != "is it blue?"])
    return folder


def options_of(data, output_dir, *options):
    return [
        f"--train_file={data / 'train.jsonl'}",
        f"--validation_file={data / 'validation.jsonl'}",
        *OPTIONS,
        "--per_device_train_batch_size=4",
        f"--output_dir={output_dir}",
        *options,
    ]


def test_learns_the_toy_data_and_leaves_a_model_that_answers(data, tmp_path):
    metrics = run_vqa.main(options_of(data, tmp_path, "--max_steps=100", "--per_device_train_batch_size=12"))
    assert metrics["eval_accuracy"] == 1.0
    results = read_json(tmp_path / "eval_results.json")
    assert results["eval_accuracy"] == 1.0
    assert results["seed"] == 42
    assert {"command", "git_commit", "date", "device_name", "num_threads", "torch_version"} <= results.keys()
    rows = predictions(tmp_path)
    assert {row["source"] for row in rows} == {f"validation.jsonl row {number}" for number in range(1, 9)}
    for row in rows:
        assert row["prediction"] == row["answers"][0]
    with Image.open(tmp_path / "training.png") as figure:
        assert figure.width > figure.height

    model = TripsForQuestionAnswering.from_pretrained(tmp_path)
    processor = TripsProcessor.from_pretrained(tmp_path)
    image = Image.new("RGB", (64, 64), "green")
    inputs = processor(images=image, text="what color is it?", return_tensors="pt")
    assert processor.post_process_answers(model.generate(**inputs)) == ["green"]

    assert model.config.confidence_temperature == metrics["eval_confidence_temperature"] != 1
    assert metrics["eval_calibration_error"] != metrics["eval_calibration_error_uncalibrated"]
    pipeline = TripsVisualQuestionAnsweringPipeline(model=model, processor=processor)
    ((known,), (unknown,)) = pipeline(image=image, question=["what color is it?", "what kind is it?"], top_k=1)
    model.config.confidence_temperature = 1.0
    assert pipeline(image=image, question="what color is it?", top_k=1)[0]["score"] != known["score"] <= 1
    assert "unknown_words" not in known and unknown["unknown_words"]

    run_vqa.main(options_of(data, tmp_path / "next", f"--model={tmp_path}", "--max_steps=1", "--do_eval=False"))
    uncalibrated = TripsConfig.from_pretrained(tmp_path / "next")
    assert (uncalibrated.confidence_temperature, uncalibrated.question_tokens) == (1.0, None)


def test_answers_that_the_model_cannot_write_are_counted(data, tmp_path, caplog):
    """In a warning before the training and in the results."""
    rows = read(data / "validation.jsonl")
    for row in rows:
        if row.get("answer") == "no":
            row["answer"] = "50%"
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "validation.jsonl", rows)
    make_bert_tokenizer(["what color is it? red blue green white yes 50%"]).save_pretrained(tmp_path / "bert")
    options = [f"--image_root={data}", f"--tokenizer={tmp_path / 'bert'}", "--max_steps=1"]
    metrics = run_vqa.main(options_of(tmp_path, tmp_path / "out", *options))
    assert metrics["eval_unwritable_answers"] == 3 + 4  # "50%", and "other"
    assert "50%" in caplog.text


@pytest.mark.parametrize(
    "options, used_for",
    [
        (["--schedule=unpruned"], "none"),
        (["--selection_loss_weight=0"], "none"),
        ([], "selection loss"),
    ],
    ids=str,
)
def test_a_run_says_what_regions_teach(options, used_for, data, tmp_path, capsys):
    rows = [{**row, "region": [8, 8, 24, 24]} for row in read(data / "train.jsonl")]
    file = write(tmp_path / "regions.jsonl", rows)
    options = [f"--train_file={file}", f"--image_root={data}", "--max_steps=1", *options]
    run_vqa.main(options_of(data, tmp_path / "out", *options))
    for name in ("train", "eval"):
        results = read_json(tmp_path / "out" / f"{name}_results.json")
        assert results["regions_used_for"] == used_for
        assert results["precision"] == "float32"
        assert results["cpu_capability"]
    assert f"examples/ask.py --model {tmp_path / 'out'} " in capsys.readouterr().out


def test_a_bad_row_stops_the_run_unless_it_may_be_skipped(data, tmp_path, caplog):
    rows = read(data / "train.jsonl")
    Image.new("RGB", (64, 7)).save(tmp_path / "banner.png")  # the tiny preset has patches of 8
    rows[4]["image"] = str(tmp_path / "banner.png")
    rows[7]["answer"] = "no " * 70
    broken = write(tmp_path / "broken.jsonl", rows)
    options = [f"--train_file={broken}", f"--image_root={data}", "--do_eval=False", "--max_steps=1"]
    with pytest.raises(ValueError, match="(?s)1 of the 12 rows .*row 5: image smaller than a patch"):
        run_vqa.main(options_of(data, tmp_path / "out", *options))
    run_vqa.main(options_of(data, tmp_path / "out", *options, "--skip_bad_rows"))
    assert "Skipped 1 of the 12 rows of broken.jsonl" in caplog.text
    assert "Skipped 1 of the 11 rows of train (more than 64 tokens: 1)" in caplog.text


BEST = ["--eval_strategy=steps", "--eval_steps=1", "--load_best_model_at_end", "--metric_for_best_model=accuracy"]


@pytest.mark.parametrize(
    "options", [[], pytest.param(BEST, marks=pytest.mark.slow)], ids=["the last weights", "the best weights"]
)
def test_resuming_a_finished_run_trains_no_further(options, data, tmp_path, capfd):
    """Four steps of four rows end within an epoch of twelve."""
    steps = ["--max_steps=4", "--save_strategy=steps", "--save_steps=1", "--do_eval=False", "--report_to=none"]
    words = options_of(data, tmp_path, *steps, *options)
    run_vqa.main(words)
    expected = load_file(tmp_path / "model.safetensors")
    folders = {path.name for path in tmp_path.glob("checkpoint-*")}
    for _ in range(2):
        (tmp_path / "model.safetensors").unlink()
        run_vqa.main([*words, "--resume_from_checkpoint=last"])
        weights = load_file(tmp_path / "model.safetensors")
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)
        assert {path.name for path in tmp_path.glob("checkpoint-*")} == folders
        assert read_json(tmp_path / "trainer_state.json")["global_step"] == 4
    printed = capfd.readouterr().err  # nothing looks like damage
    assert "missing keys" not in printed
    assert "do not match" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_no_number_stops_the_run(processes, data, tmp_path):
    """The row comes in one of three steps, in the batch of one process."""
    options = [
        "--do_eval=False",
        "--num_train_epochs=1",
        "--save_strategy=steps",
        "--save_steps=1",
        f"--per_device_train_batch_size={4 // processes}",
        "--texts_per_image=1",
    ]
    launch = TWO_PROCESSES if processes == 2 else []
    command = [*launch, str(HELPERS / "poisoned_run.py"), *options_of(data, tmp_path, *options)]
    poisoned = "train.jsonl row 7"
    environment = {**ENVIRONMENT, "POISONED": poisoned}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    errors = set(re.findall(r"FloatingPointError: (The loss of step .*)", result.stderr))
    assert len(errors) == 1, result.stderr[-3000:]  # all processes report the same
    step, rows, rest = re.fullmatch(r"The loss of step (\d) is nan for the rows (.*?)\. (.*)", errors.pop()).groups()
    rows = rows.split(", ")
    assert len(rows) == 4 // processes
    assert poisoned in rows
    saved = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert saved == {f"checkpoint-{number}" for number in range(1, int(step))}
    assert "--resume_from_checkpoint" in rest
