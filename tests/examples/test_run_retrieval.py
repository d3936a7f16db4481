"""`examples/run_retrieval.py` on a toy data set: results, batches and two processes."""

from pathlib import Path

import pytest
import toy_tasks
from json_files import read_json
from places import EXAMPLES, HELPERS
from toy_pairs import TWO_PROCESSES
from toy_tasks import predictions, run, write_task

from trips_examples import run_retrieval


SCRIPT = str(EXAMPLES / "run_retrieval.py")
OPTIONS = [*toy_tasks.OPTIONS, "--per_device_train_batch_size=6", "--per_device_eval_batch_size=4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return the options of files with five images and two captions each."""
    return write_task("captions", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Train a model on the toy data. Return it with its metrics."""
    folder = tmp_path_factory.mktemp("trained")
    options = [
        "--max_steps=60",
        "--per_device_train_batch_size=10",
        "--logging_steps=20",
        "--texts_per_image=2",
        "--eval_strategy=steps",
        "--eval_steps=30",
        "--rerank_k=3",
        f"--output_dir={folder}",
    ]
    return folder, run_retrieval.main([*data, *OPTIONS, *options])


def test_learns_the_toy_data(trained):
    folder, metrics = trained
    for name in ("i2t_r1", "t2i_r1", "r_mean", "features_r_mean"):
        assert metrics[f"eval_{name}"] > 0.9
    assert metrics["eval_samples"] == 10
    assert metrics["eval_images"] == 5
    assert read_json(folder / "eval_results.json")["eval_t2i_r1"] == metrics["eval_t2i_r1"]
    logs = read_json(folder / "trainer_state.json")["log_history"]
    losses = [entry for entry in logs if "loss" in entry]
    for entry in losses:  # both beside their sum
        assert entry["loss"] == pytest.approx(entry["itc_loss"] + entry["itm_loss"], rel=1e-3)
    assert len(losses) == 3
    assert losses[0]["itm_loss"] > losses[-1]["itm_loss"]
    searches = [entry for entry in logs if "eval_r_mean" in entry]  # during training, too
    assert [entry["step"] for entry in searches] == [30, 60]
    assert searches[-1]["eval_r_mean"] == metrics["eval_r_mean"]


def test_what_was_found_is_written_down(trained):
    folder, _ = trained
    rows = predictions(folder)
    assert [row["caption"] for row in rows[:2]] == ["all is black here", "a black image"]  # sorted by image
    assert {row["source"] for row in rows} == {f"rows.jsonl row {number}" for number in range(1, 6)}
    for row in rows:
        assert len(row["found"]) == 3
        right = row["found"][row["first_right"] - 1]
        assert Path(right).stem in row["caption"].split()


def test_evaluation_alone_finds_the_same(data, trained, tmp_path):
    folder, expected = trained
    options = [*data, *OPTIONS, f"--model={folder}", "--do_train=False", f"--output_dir={tmp_path}"]
    metrics = run_retrieval.main([*options, "--rerank_k=3"])
    for name in ("eval_r_mean", "eval_features_r_mean", "eval_reranked_pairs"):
        assert metrics[name] == expected[name]
    metrics = run_retrieval.main([*options, "--rerank_k=0", "--bf16_full_eval"])
    assert "eval_r_mean" not in metrics
    assert metrics["eval_features_r_mean"] > 0.9
    assert [len(row["found"]) for row in predictions(tmp_path)] == [5] * 10


@pytest.mark.slow
def test_two_processes_evaluate_as_one(data, trained, tmp_path):
    # 5 images in batches of 4 are 2 batches, 10 captions 3: one process has more than the other.
    folder, expected = trained
    options = [f"--model={folder}", "--do_train=False", "--rerank_k=3", f"--output_dir={tmp_path}"]
    run(*TWO_PROCESSES, SCRIPT, *data, *OPTIONS, *options)
    assert predictions(tmp_path) == predictions(folder)
    results = read_json(tmp_path / "eval_results.json")
    for name, value in results.items():
        if name.startswith("eval_"):
            assert value == expected[name]


@pytest.mark.slow
def test_sharded_training_refuses_to_evaluate_before_it_starts(data, tmp_path):
    launch = ["-m", "accelerate.commands.launch", f"--config_file={EXAMPLES / 'configs/fsdp2.yaml'}"]
    launch += ["--num_processes=2", "--main_process_port=0", str(HELPERS / "fsdp_on_cpu.py"), SCRIPT]
    with pytest.raises(AssertionError, match="Train with --do_eval False"):
        run(*launch, *data, *OPTIONS, "--max_steps=1", "--use_cpu=True", f"--output_dir={tmp_path}")
