"""Setup of a run: protected folders, and what is not saved."""

import json
import subprocess
import sys

import pytest
import torch

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
