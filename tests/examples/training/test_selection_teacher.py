"""The selection teacher: its attention, the targets, and a run with it."""

import json

import pytest
import torch
from tiny_models import IMAGES, TEXTS, make_config
from toy_tasks import OPTIONS, write_task

from modeling_trips import TripsForImagesAndTextClassification, TripsForQuestionAnswering, TripsModel
from trips_examples import run_nlvr2, run_vqa
from trips_examples.training.models import SelectionTeacher, make_selection_teacher
from trips_examples.training.options import ModelArguments


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    TripsForQuestionAnswering(make_config(selection_layers=[1, 3])).save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def inputs(rows=slice(0, 4)):
    return {"input_ids": TEXTS[rows], "attention_mask": (TEXTS[rows] != 0).long(), "pixel_values": IMAGES[rows, 0]}


def test_targets_are_the_attention_of_the_text(checkpoint):
    targets = SelectionTeacher(checkpoint).patch_targets(inputs())
    model = TripsModel.from_pretrained(checkpoint, keep_rate=1.0, attn_implementation="eager")
    maps = torch.stack(model(**inputs(), output_attentions=True).cross_attentions)  # layers, texts, heads, tokens, 65
    by_hand = maps[:, :, :, 0, 1:].mean(dim=(0, 2))
    torch.testing.assert_close(targets, by_hand / by_hand.sum(dim=1, keepdim=True))
    assert targets.shape == (4, 64) and not targets.requires_grad


def test_texts_that_share_an_image_and_texts_with_several(checkpoint):
    teacher = SelectionTeacher(checkpoint)
    shared = {**inputs(), "pixel_values": IMAGES[:2, 0], "image_index": torch.tensor([0, 1, 1, 0])}
    repeated = {**inputs(), "pixel_values": IMAGES[[0, 1, 1, 0], 0]}
    torch.testing.assert_close(teacher.patch_targets(shared), teacher.patch_targets(repeated))

    index = torch.tensor([[0, 1], [2, 0]])
    pairs = {**inputs(slice(0, 2)), "pixel_values": IMAGES[:3, 0], "image_index": index}
    targets = teacher.patch_targets(pairs).view(2, 2, 64)
    one = {**inputs(slice(1, 2)), "pixel_values": IMAGES[2:3, 0]}
    torch.testing.assert_close(targets[1, 0], teacher.patch_targets(one)[0])


def test_single_stream_teacher_raises(tmp_path):
    config = make_config(fusion_type="single_stream", selection_layers=[1])
    TripsForImagesAndTextClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--selection_teacher"):
        SelectionTeacher(str(tmp_path))


def test_missing_start_raises():
    with pytest.raises(ValueError, match="--model_name_or_path"):
        make_selection_teacher(ModelArguments(selection_teacher="start"), torch.device("cpu"))


@pytest.mark.parametrize(("script", "task"), [(run_vqa, "vqa"), (run_nlvr2, "nlvr2")])
def test_runs_log_the_selection_loss(script, task, tmp_path):
    data = write_task(task, tmp_path)
    script.main([*data, *OPTIONS, "--max_steps=1", "--keep_rate=1.0", f"--output_dir={tmp_path / 'start'}"])
    options = ["--keep_rate=0.5", f"--model_name_or_path={tmp_path / 'start'}", "--selection_teacher=start"]
    script.main([*data, *OPTIONS, *options, "--max_steps=2", "--logging_steps=1", f"--output_dir={tmp_path / 'run'}"])
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert all(entry["selection_loss"] > 0 for entry in log if "loss" in entry)
