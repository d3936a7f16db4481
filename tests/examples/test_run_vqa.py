"""`examples/run_vqa.py` on a toy data set: results, resuming after a kill, and losses that are not finite."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest
import torch
from places import EXAMPLES, ROOT
from safetensors.torch import load_file
from tiny_processors import make_bert_tokenizer
from toy_pairs import TWO_PROCESSES
from toy_tasks import ENVIRONMENT, OPTIONS, predictions, run

from modeling_trips import TripsForQuestionAnswering, TripsProcessor
from trips_examples import run_vqa


COLORS = ["red", "blue", "green", "white"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Return the options of two files: 4 images with 3 training questions each, 2 of them for validation."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for color in COLORS:
        PIL.Image.new("RGB", (64, 64), color).save(folder / f"{color}.png")
        rows.append({"image": f"{color}.png", "question": "what color is it?", "answers": [color] * 9 + ["other"]})
        rows.append({"image": f"{color}.png", "question": "is it red?", "answer": "yes" if color == "red" else "no"})
        rows.append({"image": f"{color}.png", "question": "is it blue?", "answer": "yes" if color == "blue" else "no"})
    train, validation = folder / "train.jsonl", folder / "validation.jsonl"
    train.write_text("\n".join(map(json.dumps, rows)))
    validation.write_text("\n".join(json.dumps(row) for row in rows if row["question"] != "is it blue?"))
    return [f"--train_file={train}", f"--validation_file={validation}"]


def options_of(data: list[str], output_dir: Path, *options: str) -> list[str]:
    return [*data, *OPTIONS, "--per_device_train_batch_size=4", f"--output_dir={output_dir}", *options]


def test_learns_the_toy_data_and_leaves_a_model_that_answers(data, tmp_path):
    metrics = run_vqa.main(options_of(data, tmp_path, "--max_steps=100", "--per_device_train_batch_size=12"))
    assert metrics["eval_accuracy"] == 1.0
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert (results["eval_accuracy"], results["seed"]) == (1.0, 42)
    assert {"command", "git_commit", "date", "device_name", "num_threads", "torch_version"} <= results.keys()
    rows = predictions(tmp_path)
    assert len(rows) == 8 and all(row["prediction"] == row["answers"][0] for row in rows)
    assert {row["source"] for row in rows} == {f"validation.jsonl row {number}" for number in range(1, 9)}
    with PIL.Image.open(tmp_path / "training.png") as figure:
        assert figure.width > figure.height

    model, processor = TripsForQuestionAnswering.from_pretrained(tmp_path), TripsProcessor.from_pretrained(tmp_path)
    image = PIL.Image.new("RGB", (64, 64), "green")
    inputs = processor(images=image, text="what color is it?", return_tensors="pt")
    assert processor.post_process_answers(model.generate(**inputs)) == ["green"]


def test_answers_that_the_model_cannot_write_are_counted(data, tmp_path, caplog):
    """In a warning before the training and in the results."""
    files = [Path(option.partition("=")[2]) for option in data]
    (tmp_path / "rows.jsonl").write_text(files[1].read_text().replace('"answer": "no"', '"answer": "50%"'))
    make_bert_tokenizer(["what color is it? red blue green white yes 50%"]).save_pretrained(tmp_path / "bert")
    files = [f"--{split}_file={tmp_path / 'rows.jsonl'}" for split in ("train", "validation")]
    options = [*files, f"--image_root={Path(data[0].partition('=')[2]).parent}", f"--tokenizer={tmp_path / 'bert'}"]
    metrics = run_vqa.main(options_of(options, tmp_path / "out", "--max_steps=1"))
    assert metrics["eval_unwritable_answers"] == 3 + 4  # "50%", and "other"
    assert "'50%' becomes '50 %'" in caplog.text
    assert len([record for record in caplog.records if "does not know" in record.message]) <= 3  # per split, and one


@pytest.mark.parametrize(
    ("options", "used_for"),
    [
        ([], "selection loss"),
        (["--schedule=unpruned"], "none"),
        (["--selection_loss_weight=0", "--selection_gate=0.2"], "none"),
        (["--selection_gate=0.2"], "selection loss"),
    ],
    ids=str,
)
def test_a_run_says_what_regions_teach(options, used_for, data, tmp_path, capsys):
    files = [Path(option.partition("=")[2]) for option in data]
    rows = [{**json.loads(line), "region": [8, 8, 24, 24]} for line in files[0].read_text().splitlines()]
    (tmp_path / "regions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with_regions = [f"--train_file={tmp_path / 'regions.jsonl'}", data[1], f"--image_root={files[0].parent}"]
    run_vqa.main(options_of(with_regions, tmp_path / "out", "--max_steps=1", *options))
    for name in ("train", "eval"):
        results = json.loads((tmp_path / "out" / f"{name}_results.json").read_text())
        assert results["regions_used_for"] == used_for
        assert results["precision"] == "float32" and results["cpu_capability"]
    assert f"examples/ask.py --model {tmp_path / 'out'} " in capsys.readouterr().out


def test_a_bad_row_stops_the_run_unless_it_may_be_skipped(data, tmp_path, caplog):
    broken = tmp_path / "broken.jsonl"
    source = Path(data[0].split("=")[1])
    lines = source.read_text().splitlines()
    PIL.Image.new("RGB", (64, 7)).save(tmp_path / "banner.png")  # the tiny preset has patches of 8
    lines[4] = json.dumps({"image": str(tmp_path / "banner.png"), "question": "is it red?", "answer": "no"})
    lines[6] = json.dumps({"image": "red.png", "question": "is it red?", "answer": "no " * 70})
    broken.write_text("\n".join(lines))
    files = [f"--train_file={broken}", f"--image_root={source.parent}", "--do_eval=False", "--max_steps=1"]
    with pytest.raises(ValueError, match="(?s)1 of the 12 rows .*row 5: image smaller than a patch"):
        run_vqa.main(options_of(files, tmp_path / "out"))
    run_vqa.main(options_of(files, tmp_path / "out", "--skip_bad_rows"))
    assert "Skipped 1 of the 12 rows of broken.jsonl" in caplog.text
    assert "Skipped 1 of the 11 rows of train (more than 64 tokens: 1)" in caplog.text


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_weights_of_a_run_left_alone(data, tmp_path):
    options = ["--max_steps=12", "--save_strategy=steps", "--save_steps=4", "--do_eval=False", "--logging_steps=1"]
    script = str(EXAMPLES / "run_vqa.py")
    run(script, *options_of(data, tmp_path / "alone", *options))

    killed = [script, *options_of(data, tmp_path / "killed", *options)]
    process = subprocess.Popen([sys.executable, *killed], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    # The trainer state is written last and marks a complete checkpoint.
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed/checkpoint-4/trainer_state.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/model.safetensors").exists()

    last_step = max(int(path.name.split("-")[1]) for path in (tmp_path / "killed").glob("checkpoint-*"))
    printed = run(*killed, "--resume_from_checkpoint=last")
    assert printed.count("'loss'") == 12 - last_step  # it resumed
    expected, actual = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "killed"))
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, msg=name)


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
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
        assert {path.name for path in tmp_path.glob("checkpoint-*")} == folders
        assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 4
    printed = capfd.readouterr().err  # nothing looks like damage
    assert "missing keys" not in printed and "do not match" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_no_number_stops_the_run(processes, data, tmp_path):
    """The row comes in one of three steps, in the batch of one process."""
    options = ["--do_eval=False", "--num_train_epochs=1", "--save_strategy=steps", "--save_steps=1"]
    options += [f"--per_device_train_batch_size={4 // processes}", "--texts_per_image=1"]
    launch = TWO_PROCESSES if processes == 2 else []
    command = [*launch, str(ROOT / "tests" / "helpers" / "poisoned_run.py"), *options_of(data, tmp_path, *options)]
    poisoned = "train.jsonl row 7"
    environment = {**ENVIRONMENT, "POISONED": poisoned}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    errors = set(re.findall(r"FloatingPointError: (The loss of step .*)", result.stderr))
    assert len(errors) == 1, result.stderr[-3000:]  # all processes report the same
    step, rows, rest = re.fullmatch(r"The loss of step (\d) is nan for the rows (.*?)\. (.*)", errors.pop()).groups()
    assert len(rows.split(", ")) == 4 // processes and poisoned in rows.split(", ")
    saved = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert saved == {f"checkpoint-{number}" for number in range(1, int(step))}
    assert "--resume_from_checkpoint" in rest
