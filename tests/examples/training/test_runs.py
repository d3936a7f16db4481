"""Setup of a run: protected folders, and what is not saved."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from toy_tasks import OPTIONS, write_task

from modeling_trips.inspection import provenance
from trips_examples.training.options import TrainingOptions, make_parser
from trips_examples.training.runs import TripsTrainingArguments, parse_arguments


PARSER = make_parser(TrainingOptions, description="")


def test_the_token_of_the_hub_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["examples/run_vqa.py", "--hub_token", "hf_secret", "--hub_token=hf_secret"])
    args = TripsTrainingArguments(output_dir=str(tmp_path), hub_token="hf_secret")
    assert args.hub_token == "hf_secret"
    torch.save(args, tmp_path / "training_args.bin")
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).output_dir == str(tmp_path)
    assert "hf_secret" not in json.dumps(provenance())


HOLD = """
import sys
from trips_examples.training.options import TrainingOptions, make_parser
from trips_examples.training.runs import parse_arguments

PARSER = make_parser(TrainingOptions, description="")

parse_arguments(PARSER, ["--report_to=none", "--output_dir", sys.argv[1]])
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_output_dir_is_locked_until_the_process_ends(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    options = ["--report_to=none", "--output_dir", str(tmp_path / "link")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], **pipes) as first:
        assert first.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match="--output_dir"):
            parse_arguments(PARSER, options)
        parse_arguments(PARSER, [*options, "--do_train=False"])
        first.kill()
    parse_arguments(PARSER, options)


@pytest.mark.slow
def test_a_training_that_cannot_write_its_weights_leaves_no_model_that_loads(tmp_path):
    """The size of files is limited, as by a full disk. Other weights were in the folder."""
    output = tmp_path / "out"
    output.mkdir()
    save_file({"weight": torch.zeros(2)}, output / "model.safetensors")
    options = [*write_task("vqa", tmp_path), *OPTIONS, "--max_steps=1", "--overwrite_output_dir", "--save_strategy=no"]
    command = [sys.executable, "-m", "trips_examples.run_vqa", *options, f"--output_dir={output}"]
    limits = (200_000, 200_000)  # bytes
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )
    assert result.returncode != 0
    assert (output / "config.json").exists()
    assert not any(path.stat().st_size for path in output.glob("*.safetensors"))
