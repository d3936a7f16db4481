"""The trainer of pre-training: teacher, learning rates by part, queue and logs."""

import pytest
import torch
from datasets import Dataset
from toy_pairs import make_rows
from transformers import HfArgumentParser

from modeling_trips import TripsConfig, TripsForPreTraining
from trips_examples.data.collators import PretrainingCollator
from trips_examples.training.options import PretrainingArguments
from trips_examples.training.pretraining import PretrainingTrainer
from trips_examples.training.runs import TripsTrainingArguments


def make_trainer(processor, folder, config_fields=None, **options):
    """Return a trainer of 20 rows. `options` are fields of the arguments of training or of pre-training."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "texts_per_image": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "queue_size": 16,
        "teacher_start_steps": 0,
    }
    parser = HfArgumentParser((TripsTrainingArguments, PretrainingArguments))
    args, task_args = parser.parse_dict({**defaults, **options})
    torch.manual_seed(0)
    config = TripsConfig.from_preset(
        "tiny", text_config={"vocab_size": len(processor.tokenizer)}, projection_dim=16, **(config_fields or {})
    )
    return PretrainingTrainer(
        model=TripsForPreTraining(config),
        args=args,
        task_args=task_args,
        data={"train": Dataset.from_list(make_rows(20))},
        data_collator=PretrainingCollator(processor),
        processing_class=processor,
    )


def test_the_teacher_follows_each_step_of_the_optimizer(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, max_steps=3, save_strategy="no", gradient_accumulation_steps=2)
    trainer.teacher.momentum = 0.75
    original = trainer.teacher.update
    expected = trainer.model.itm_head.weight.detach().clone()
    history = []

    def update(model, momentum):
        history.append(model.itm_head.weight.detach().clone())
        original(model, momentum)

    trainer.teacher.update = update
    trainer.train()
    assert len(history) == 3
    assert not torch.equal(history[0], history[2])
    for weight in history:
        expected = 0.75 * expected + 0.25 * weight
    torch.testing.assert_close(trainer.teacher.model.itm_head.weight, expected)


def test_the_teacher_gains_weight_over_an_epoch(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, max_steps=1, gradient_accumulation_steps=2)
    assert trainer.epoch_steps == 3  # 20 rows in batches of 4, with two batches per step

    def weights():
        found = []
        for trainer.state.global_step in range(7):
            found.append(trainer.current_teacher_weight())
        return found

    assert weights() == pytest.approx([0, 0.4 / 3, 0.8 / 3, 0.4, 0.4, 0.4, 0.4])
    trainer.task_args.teacher_start_steps = None
    assert weights() == pytest.approx([0, 0, 0, 0, 0.4 / 3, 0.8 / 3, 0.4])


def test_teacher_equals_the_model_before_it_starts(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, max_steps=3, save_strategy="no", warmup_steps=0, teacher_start_steps=2)
    forward = trainer.teacher.forward
    steps = []

    def watched(**inputs):
        steps.append(trainer.state.global_step)
        assert all(map(torch.equal, trainer.teacher.model.parameters(), trainer.model.parameters()))
        return forward(**inputs)

    trainer.teacher.forward = watched
    trainer.train()
    assert steps == [2]  # only the third step calls it
    assert not torch.equal(trainer.teacher.model.itm_head.weight, trainer.model.itm_head.weight)
    assert (trainer.teacher.texts.ids != -1).sum() == 4


def test_towers_have_learning_rates_of_their_own(processor, tmp_path):
    def groups(**options):
        """Return the learning rate and weight decay by parameter."""
        trainer = make_trainer(processor, tmp_path, max_steps=1, learning_rate=1e-4, **options)
        names = {parameter: name for name, parameter in trainer.model.named_parameters()}
        found = {}
        for group in trainer.create_optimizer().param_groups:
            for parameter in group["params"]:
                found[names.pop(parameter)] = (group["lr"], group["weight_decay"])
        assert not names
        return found

    expected = {}
    for name, (rate, decay) in groups().items():
        if ".vision_model." in name:
            rate = 1e-5
        elif ".text_model." in name:
            rate = 2e-5
        expected[name] = (rate, decay)
    assert groups(tower_learning_rate=[1e-5, 2e-5]) == expected


def test_each_objective_is_logged(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, max_steps=4, logging_steps=2, save_strategy="no")
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        parts = [entry[name] for name in ("itc_loss", "itm_loss", "mlm_loss", "prefix_lm_loss")]
        assert sum(parts) == pytest.approx(entry["loss"], rel=1e-3)
        assert entry["teacher_weight"] == pytest.approx(0.4 * min(1, entry["step"] / 5))


def test_no_teacher_file_without_a_teacher(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, max_steps=1, save_steps=1, momentum_teacher=False)
    trainer.train()
    assert trainer.teacher is None
    assert not list(tmp_path.rglob("momentum.safetensors"))
    only_matching = {"itc_weight": 0.0, "mlm_weight": 0.0}
    trainer = make_trainer(processor, tmp_path, only_matching, max_steps=1)
    assert trainer.teacher is None
