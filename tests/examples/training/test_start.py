"""The start model of NLVR2 and grounding on bundled synthetic data: trained on questions with the same options."""

import pytest
import torch
from safetensors.torch import load_file
from toy_tasks import write_task

from modeling_trips import TripsConfig, TripsProcessor
from trips_examples import run_grounding, run_nlvr2
from trips_examples.training.options import DataArguments, ModelArguments, TripsTrainingArguments
from trips_examples.training.question_answering import start_from_questions


BRIEF = ["--max_train_samples=8", "--max_eval_samples=8", "--start_epochs=1", "--num_train_epochs=1", "--use_cpu=True"]
# The task's training does not change the weights.
FROZEN = [*BRIEF, "--learning_rate=0", "--auto_bf16=False", "--disable_tqdm=True", "--save_steps=1"]


@pytest.mark.parametrize("script", [run_nlvr2, run_grounding], ids=["nlvr2", "grounding"])
def test_tasks_start_from_question_answering(script, tmp_path):
    options = [*FROZEN, f"--output_dir={tmp_path}", "--keep_rate=0.25"]
    script.main(options)
    start, weights = load_file(tmp_path / "easy_vqa/model.safetensors"), load_file(tmp_path / "model.safetensors")
    shared = {name for name in start if name in weights and "running" not in name and "batches" not in name}
    assert len(shared) > 100
    assert all(torch.equal(start[name], weights[name]) for name in shared)
    processor = TripsProcessor.from_pretrained(tmp_path / "easy_vqa")
    assert processor.image_processor.size == {"height": 32, "width": 32}
    assert TripsConfig.from_pretrained(tmp_path / "easy_vqa").vision_config.keep_rate == 0.25

    written = (tmp_path / "easy_vqa/model.safetensors").stat().st_mtime_ns
    script.main([*options, "--resume_from_checkpoint=last"])
    assert (tmp_path / "easy_vqa/model.safetensors").stat().st_mtime_ns == written


def test_deepspeed_is_told_what_to_do(tmp_path):
    """DeepSpeed supports one model per launch. The plugin is a dummy."""
    args = TripsTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match="--start_epochs"):
        start_from_questions(ModelArguments(), DataArguments(), args, None, 64)
    assert start_from_questions(ModelArguments(), DataArguments(), args, 0.0, 64) == ModelArguments()


def test_max_steps_skips_the_start_with_a_warning(tmp_path, caplog):
    options = [f"--output_dir={tmp_path}", "--max_steps=1", "--train_scenes=4", "--validation_scenes=2"]
    run_nlvr2.main([*options, *(option for option in FROZEN if "epochs" not in option)])
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "easy_vqa").exists()
    assert "--start_epochs" in caplog.text


@pytest.mark.slow
def test_no_start_for_checkpoints_and_own_data(tmp_path):
    own = write_task("nlvr2", tmp_path)
    run_nlvr2.main([*FROZEN, *own, f"--output_dir={tmp_path / 'own'}"])
    run_nlvr2.main([*FROZEN, f"--output_dir={tmp_path / 'checkpoint'}", f"--model_name_or_path={tmp_path / 'own'}"])
    run_nlvr2.main([*FROZEN, f"--output_dir={tmp_path / 'scratch'}", "--start_epochs=0"])
    for name in ("own", "checkpoint", "scratch"):
        assert (tmp_path / name / "model.safetensors").exists() and not (tmp_path / name / "easy_vqa").exists()
