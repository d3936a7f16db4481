"""Pre-training in several processes and after a kill gives the result of one uninterrupted process."""

import os
import sys
from pathlib import Path

import pytest
import torch
from json_files import read_json
from killed import kill_when
from places import ROOT
from programs import output_of
from safetensors.torch import load_file
from torch.testing import assert_close
from toy_pairs import TWO_PROCESSES, command, write_parts
from toy_tasks import run

from trips_examples import run_pretraining
from trips_examples.training.pretraining import stream_positions


pytestmark = pytest.mark.slow
STAND_INS = {
    "scontrol": "echo 127.0.0.1",
    "srun": """pids=()
for node in 0 1; do
    SLURM_NODEID=$node "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done""",
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


def assert_equal(folder, expected, *names):
    for name in names:
        weights, weights_expected = load_file(folder / name), load_file(expected / name)
        assert weights.keys() == weights_expected.keys()
        for key, weight in weights_expected.items():
            assert_close(weights[key], weight, rtol=0, atol=0, msg=f"{name}: {key}")


def killed_and_resumed(words, folder):
    """Kill a run with its workers after its first complete checkpoint, resume it, and return the output."""
    kill_when((folder / "checkpoint-4/trainer_state.json").exists, [sys.executable, *words])
    assert not (folder / "model.safetensors").exists()
    return run(*words, "--resume_from_checkpoint=last")


def test_killed_and_resumed_ends_as_a_run_left_alone(stream, tmp_path):
    """
    Two processes read a stream. Weights, the teacher and its queues are equal, although masks, cuts and hard negatives
    are random.
    """
    options = ["--per_device_train_batch_size=3", "--ddp_find_unused_parameters=False", "--max_steps=12"]
    options += ["--save_steps=4", "--logging_steps=1"]
    run(*TWO_PROCESSES, *command(stream, tmp_path / "alone", *options))
    words = [*TWO_PROCESSES, *command(stream, tmp_path / "killed", *options)]
    printed = killed_and_resumed(words, tmp_path / "killed")
    assert 0 < printed.count("'loss'") <= 8  # it resumed
    last = ("model.safetensors", "checkpoint-12/model.safetensors", "checkpoint-12/momentum.safetensors")
    assert_equal(tmp_path / "killed", tmp_path / "alone", *last)
    queue = load_file(tmp_path / "alone" / last[-1])["texts.ids"]
    assert (queue != -1).all()  # 72 texts and a queue of 40


def test_the_slurm_script_trains_on_two_nodes(folder, parts, tmp_path):
    """Run two "nodes" on this machine, with replacements for SLURM's commands."""
    for name, code in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\nset -e\n{code}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "9725"}
    slurm |= {"SLURM_CPUS_PER_TASK": "1", "DATA": str(folder), "OUTPUT_DIR": str(tmp_path / "out")}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm |= {"GPUS_PER_NODE": "1", "OMP_NUM_THREADS": "1", "PATH": path}
    options = [f"--train_shards={folder}/pairs-{{0..2}}.tar", "--shuffle_buffer=4", *parts, "--image_size=32"]
    options += ["--schedule=2:text:0.7", "--max_steps=2", "--warmup_steps=0", "--per_device_train_batch_size=3"]
    options += ["--dataloader_num_workers=0", "--use_cpu=True", "--logging_steps=1"]
    script = ROOT / "examples/configs/slurm_multi_node.sh"
    for step in (2, 4):  # the second run resumes
        steps = [f"--max_steps={step}", "--save_steps=2", "--disable_tqdm=True"]
        printed = output_of("bash", script, *options, *steps, cwd=ROOT, variables=slurm)
        assert printed.count("'loss'") == 4  # from each node
    states = [read_json(tmp_path / f"out/checkpoint-4/stream_{rank}.json") for rank in (0, 1)]
    assert [state["num_processes"] for state in states] == [2, 2]
    seen = [position["seen"] for state in states for position in stream_positions(state["loader"])]
    assert seen == [12, 12]


def test_queues_hold_what_all_processes_saw(files, tmp_path):
    """A step of two processes with three texts each gives the queues of one process with all six."""
    # Without augmentation, dropout and hard negatives, only the order is random, and it is the same.
    options = ["--max_steps=1", "--save_steps=1", "--do_eval=False", "--itm_weight=0", "--mlm_weight=0"]
    options += ["--teacher_start_steps=0"]
    run_pretraining.main(command(files, tmp_path / "one", *options)[1:])
    halves = ["--per_device_train_batch_size=3", "--ddp_find_unused_parameters=False"]
    run(*TWO_PROCESSES, *command(files, tmp_path / "two", *options, *halves))
    for part in ("images", "texts"):
        found = []
        for name in ("one", "two"):
            queue = load_file(tmp_path / name / "checkpoint-1/momentum.safetensors")
            ids, features = queue[f"{part}.ids"], queue[f"{part}.features"]
            pairs = sorted(zip(ids.tolist(), features[:, 0].tolist()))[-int((ids != -1).sum()) :]
            # An image of two processes is in the queue twice.
            found.append(sorted(dict(pairs).items()) if part == "images" else pairs)
        assert len(found[0]) > 1 and [image for image, _ in found[0]] == [image for image, _ in found[1]]
        assert [value for _, value in found[0]] == pytest.approx([value for _, value in found[1]], abs=1e-4)


def test_teacher_follows_an_fsdp_model(files, tmp_path):
    options = ["--max_steps=1", "--do_eval=False", "--warmup_steps=0", "--save_steps=1"]
    run_pretraining.main(command(files, tmp_path / "start", *options, "--learning_rate=0")[1:])
    launch = ["-m", "accelerate.commands.launch", f"--config_file={ROOT / 'examples/configs/fsdp2.yaml'}"]
    launch += ["--num_processes=2", "--main_process_port=0", str(ROOT / "tests/helpers/fsdp_on_cpu.py")]
    options += [f"--model={tmp_path / 'start'}", "--per_device_train_batch_size=3", "--use_cpu=True"]
    run(*launch, *command(files, tmp_path / "out", *options))
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "out"))
    teacher = load_file(tmp_path / "out/checkpoint-1/momentum.safetensors")
    assert not torch.equal(start["itm_head.weight"], end["itm_head.weight"])
    names = [name for name in start if f"model.{name}" in teacher and not name.endswith("num_batches_tracked")]
    assert len(names) > 50
    for name in names:
        is_statistic = name.rpartition(".")[2].startswith("running_")  # copied, not averaged
        expected = end[name] if is_statistic else 0.995 * start[name] + 0.005 * end[name]
        assert_close(teacher[f"model.{name}"], expected, rtol=1e-5, atol=1e-7, msg=name)
