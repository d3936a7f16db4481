"""All run_*.py scripts: they learn, accumulated gradients equal a larger batch, and two processes evaluate as one."""

import importlib
from pathlib import Path

import pytest
import torch
from json_files import read_json
from places import EXAMPLES
from random_checkpoint import save_random_checkpoint
from safetensors.torch import load_file
from toy_pairs import TWO_PROCESSES, encoded
from toy_tasks import COLORS, OPTIONS, SCRIPTS, predictions, run, write_task

from modeling_trips import TripsConfig, TripsModel
from trips_examples.data.collators import Nlvr2Collator
from trips_examples.data.vocabulary import train_tokenizer
from trips_examples.training.models import make_processor


METRICS = {"vqa": "accuracy", "captions": "bleu_4", "nlvr2": "accuracy", "grounding": "mean_iou"}
each_task = pytest.mark.parametrize("task", SCRIPTS)


def main_of(task):
    return importlib.import_module(f"trips_examples.{SCRIPTS[task]}").main


def losses_of(folder, name="loss"):
    logs = read_json(folder / "trainer_state.json")["log_history"]
    return [entry[name] for entry in logs if name in entry]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Return an untrained start model without BatchNorm, whose statistics depend on the batch."""
    words = "what color is it ? all is here a an image both are the square picture of , ".split()
    fields = {"vision_config": {"patch_embedding_type": "linear"}, "initializer_range": 0.02}
    folder = save_random_checkpoint(tmp_path_factory.mktemp("backbone"), TripsModel, [*words, *COLORS], **fields)
    return f"--model={folder}"


@pytest.mark.slow
@pytest.mark.parametrize("task, steps", [("captions", 120), ("nlvr2", 150), ("grounding", 200)])
def test_learns_the_toy_data_and_leaves_a_model_that_is_loaded(task, steps, tmp_path):
    folder = tmp_path / "out"
    options = [*write_task(task, tmp_path), *OPTIONS, "--per_device_train_batch_size=10"]
    metrics = main_of(task)([*options, f"--max_steps={steps}", f"--output_dir={folder}"])
    metric = "eval_accuracy" if task == "grounding" else f"eval_{METRICS[task]}"
    assert metrics[metric] == pytest.approx(1.0, abs=1e-3)
    rows = predictions(folder)
    assert {row["source"] for row in rows} == {f"rows.jsonl row {number}" for number in range(1, len(rows) + 1)}
    again = main_of(task)([*options, f"--model={folder}", "--do_train=False", f"--output_dir={tmp_path / 'again'}"])
    assert again[metric] == metrics[metric]
    assert predictions(tmp_path / "again") == rows


@each_task
def test_gradient_accumulation_equals_the_larger_batch(task, backbone, tmp_path):
    """Compare micro-batches of 1 and of 4 rows in the same order; captions and answers differ in length."""
    data = write_task(task, tmp_path)
    options = [*data, *OPTIONS, backbone, "--max_steps=2", "--optim=sgd", "--do_eval=False", "--texts_per_image=1"]
    options += ["--unpruned_share=0.5", "--relevance_share=1", "--learns_relevance=True"]
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    for folder, size, times in ((whole, 4, 1), (parts, 1, 4)):
        sizes = [f"--per_device_train_batch_size={size}", f"--gradient_accumulation_steps={times}"]
        main_of(task)([*options, *sizes, "--logging_steps=1", f"--output_dir={folder}"])
    weights = load_file(parts / "model.safetensors")
    expected = load_file(whole / "model.safetensors")
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=2e-6)
    assert len(losses_of(whole)) == 2
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-4)
    assert len(losses_of(parts, "relevance_loss")) == len(losses_of(whole, "relevance_loss")) == 2


@each_task
def test_the_test_split_is_reported_beside_the_validation_split(task, backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Java, which would take seconds to start
    _, validation = write_task(task, tmp_path)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:3]))
    out = tmp_path / "out"
    options = [
        validation,
        f"--test_file={tmp_path / 'test.jsonl'}",
        *OPTIONS,
        backbone,
        "--do_train=False",
        "--generation_max_length=5",
        f"--output_dir={out}",
    ]
    metrics = main_of(task)(options)
    assert not any(name.startswith("train") for name in metrics)
    assert metrics["eval_samples"] == len(predictions(out)) == len(lines)
    rows = predictions(out / "test")
    assert metrics["test_samples"] == len(rows) == 3
    for row in rows:
        assert row["source"].startswith("test.jsonl")
        assert all(Path(path).is_file() for path in row.get("images") or [row["image"]])
    for split, other in (("eval", "test"), ("test", "eval")):
        results = read_json(out / f"{split}_results.json")
        assert f"{split}_{METRICS[task]}" in results
        if task != "grounding":
            assert {f"{split}_collapsed", f"{split}_different_predictions"} <= results.keys()
        assert not any(name.startswith(f"{other}_") for name in results)
    metrics = main_of(task)([*options, "--do_predict=False", f"--output_dir={tmp_path / 'without'}"])
    assert not any(name.startswith("test_") for name in metrics)


@pytest.mark.slow
@each_task
def test_two_processes_evaluate_each_row_once(task, backbone, tmp_path):
    """With 5 or 10 rows in batches of 3 on 2 processes, repeated rows of the last batch must be removed."""
    options = [
        *write_task(task, tmp_path),
        *OPTIONS,
        backbone,
        "--do_train=False",
        "--per_device_eval_batch_size=3",
        "--use_cpu=True",
    ]
    one = main_of(task)([*options, f"--output_dir={tmp_path / 'one'}"])
    run(*TWO_PROCESSES, str(EXAMPLES / f"{SCRIPTS[task]}.py"), *options, f"--output_dir={tmp_path / 'two'}")
    rows = predictions(tmp_path / "one")
    assert len(rows) == one["eval_samples"] == (5 if task in ("vqa", "captions") else 10)
    rows_of_two = predictions(tmp_path / "two")
    assert [row["source"] for row in rows_of_two] == [row["source"] for row in rows]
    for row_of_two, row in zip(rows_of_two, rows):  # other batches, other rounding
        if task == "grounding":
            assert row_of_two["prediction"] == pytest.approx(row["prediction"], abs=0.02)
        else:
            assert row_of_two["prediction"] == row["prediction"]
            if task == "nlvr2":
                assert row_of_two["probability"] == pytest.approx(row["probability"], rel=1e-4)
    two = read_json(tmp_path / "two/eval_results.json")
    name = f"eval_{METRICS[task]}"
    assert two[name] == pytest.approx(one[name], rel=1e-5)


def pair(left, right, label):
    return {
        "images": [{"bytes": encoded(color), "path": None} for color in (left, right)],
        "image_ids": [left, right],
        "statement": f"both are {left}",
        "label": label,
        "source": f"toy row {left}-{right}",
    }


def test_collator_of_pairs_decodes_each_image_once_and_keeps_left_and_right():
    tokenizer = train_tokenizer(["both are red blue green"])
    processor = make_processor(tokenizer, TripsConfig.from_preset("tiny"))
    batch = Nlvr2Collator(processor)([pair("red", "blue", 1), pair("blue", "blue", 0), pair("green", "red", 1)])
    assert batch["image_index"].tolist() == [[0, 1], [1, 1], [2, 0]]
    assert batch["labels"].tolist() == [1, 0, 1]
    red, blue, green = batch["pixel_values"].mean(dim=(2, 3))
    assert [red.argmax(), green.argmax(), blue.argmax()] == [0, 1, 2]
    assert batch["sources"] == ["toy row red-blue", "toy row blue-blue", "toy row green-red"]
