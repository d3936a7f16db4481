"""The order of a run: which checkpoint it goes on from, and which it must not touch."""

import pytest

from trips_examples.training.options import TripsTrainingArguments
from trips_examples.training.runs import checkpoint_to_resume, parse_arguments


def test_resuming_from_the_last_checkpoint_needs_one(tmp_path):
    args = TripsTrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint="last")
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoint_to_resume(args)
    for step in (2, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 11:  # the run was killed while it wrote this one
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert checkpoint_to_resume(args) == str(tmp_path / "checkpoint-10")


def test_a_new_run_leaves_the_checkpoints_of_another_alone(tmp_path):
    options = ["--output_dir", str(tmp_path), "--report_to=none"]
    (tmp_path / "checkpoint-3").mkdir()  # the beginning of one counts for nothing
    parse_arguments(options, TripsTrainingArguments, description="")
    (tmp_path / "checkpoint-3" / "trainer_state.json").touch()
    with pytest.raises(ValueError, match="holds checkpoints: .* --resume_from_checkpoint last, or .* --output_dir"):
        parse_arguments(options, TripsTrainingArguments, description="")
    for more in (["--resume_from_checkpoint=last"], ["--do_train=False"]):
        parse_arguments([*options, *more], TripsTrainingArguments, description="")
