"""The checkpoint that a run resumes from, and the models that it may replace."""

import os
import shutil
from itertools import product

import pytest
import torch
from safetensors.torch import save_file

from trips_examples.training.options import TrainingOptions, make_parser
from trips_examples.training.resuming import checkpoint_to_resume
from trips_examples.training.runs import TripsTrainingArguments, parse_arguments


PARSER = make_parser(TrainingOptions, description="")


@pytest.fixture
def args(tmp_path):
    return TripsTrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint="last")


def write_checkpoint(folder):
    """Write the files of a complete checkpoint of one process."""
    folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(1000)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": torch.zeros(1000)}, folder / name)
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "trainer_state.json").write_text('{"global_step": 10}')


@pytest.fixture
def two_checkpoints(tmp_path):
    for step in (2, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}")


def test_resuming_from_the_last_checkpoint_needs_one(args, tmp_path):
    with pytest.raises(FileNotFoundError, match="last"):
        checkpoint_to_resume(args)
    for step in (2, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-11").mkdir()  # incomplete
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint_to_resume(args) == str(tmp_path / "checkpoint-10")


PARTS = ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.parametrize(
    "name, size", [*product(PARTS, [0, 15]), *((part, None) for part in PARTS if part != "model.safetensors")]
)
def test_incomplete_checkpoints_are_skipped(name, size, args, two_checkpoints, tmp_path, caplog):
    assert checkpoint_to_resume(args) == str(tmp_path / "checkpoint-10")
    assert not caplog.records
    path = tmp_path / "checkpoint-10" / name
    path.unlink() if size is None else os.truncate(path, size)
    assert checkpoint_to_resume(args) == str(tmp_path / "checkpoint-2")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(path.parent) in record.message
    assert name in record.message
    args.resume_from_checkpoint = str(path.parent)
    with pytest.raises(ValueError, match=name):
        checkpoint_to_resume(args)


def test_a_checkpoint_needs_the_random_state_of_each_process(args, two_checkpoints, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(TripsTrainingArguments, "world_size", 2)
    for state in tmp_path.glob("*/rng_state.pth"):
        shutil.copy(state, state.with_name("rng_state_1.pth"))
        state.rename(state.with_name("rng_state_0.pth"))
    assert checkpoint_to_resume(args) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "rng_state_1.pth").unlink()
    assert checkpoint_to_resume(args) == str(tmp_path / "checkpoint-2")
    assert "rng_state_1.pth" in caplog.text
    monkeypatch.setattr(TripsTrainingArguments, "world_size", 4)
    with pytest.raises(ValueError):
        checkpoint_to_resume(args)


@pytest.mark.parametrize("name", ["optimizer.bin", "optimizer_0"])
def test_the_state_of_an_optimizer_under_fsdp_is_one(name, args, tmp_path):
    write_checkpoint(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "optimizer.pt").rename(tmp_path / "checkpoint-2" / name)
    assert checkpoint_to_resume(args) == str(tmp_path / "checkpoint-2")


def test_a_run_without_states_resumes_from_weights(args, tmp_path):
    write_checkpoint(tmp_path / "checkpoint-2")
    for name in PARTS[2:]:
        (tmp_path / "checkpoint-2" / name).unlink()
    with pytest.raises(ValueError):
        checkpoint_to_resume(args)
    args.save_only_model = True
    assert checkpoint_to_resume(args) == str(tmp_path / "checkpoint-2")


def test_output_dir_with_checkpoints_raises(tmp_path):
    options = ["--output_dir", str(tmp_path), "--report_to=none"]
    (tmp_path / "checkpoint-3").mkdir()  # an incomplete checkpoint is ignored
    parse_arguments(PARSER, options)
    write_checkpoint(tmp_path / "checkpoint-4")
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint last .*--output_dir"):
        parse_arguments(PARSER, options)
    parse_arguments(PARSER, [*options, "--do_train=False"])
    (args,) = parse_arguments(PARSER, [*options, "--resume_from_checkpoint=last"])
    assert args.resume_from_checkpoint == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_model_that_the_run_did_not_write_is_not_replaced(name, tmp_path):
    options = ["--output_dir", str(tmp_path), "--report_to=none"]
    (tmp_path / name).write_text("somebody's")
    with pytest.raises(FileExistsError, match=f"{name}.*--overwrite_output_dir"):
        parse_arguments(PARSER, options)
    write_checkpoint(tmp_path / "elsewhere" / "checkpoint-4")
    with pytest.raises(FileExistsError):
        resumed = f"--resume_from_checkpoint={tmp_path / 'elsewhere' / 'checkpoint-4'}"
        parse_arguments(PARSER, [*options, resumed])
    parse_arguments(PARSER, [*options, "--overwrite_output_dir"])
    write_checkpoint(tmp_path / "checkpoint-4")  # then the model is this run's
    parse_arguments(PARSER, [*options, "--resume_from_checkpoint=last"])
