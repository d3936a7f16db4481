"""The trainer of pre-training: teacher, learning rates by part, queue and logs."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from toy_pairs import make_rows, make_tokenizer

from modeling_trips import TripsConfig, TripsForPreTraining
from trips_examples.data.collators import PretrainingCollator
from trips_examples.training.models import make_processor
from trips_examples.training.options import PretrainingArguments
from trips_examples.training.pretraining import PretrainingTrainer
from trips_examples.training.runs import TripsTrainingArguments


@pytest.fixture(scope="module")
def processor():
    return make_processor(make_tokenizer(), TripsConfig.from_preset("tiny"))


def make_trainer(processor, folder: Path, **options) -> PretrainingTrainer:
    torch.manual_seed(0)
    config_fields = options.pop("config_fields", {})
    config = TripsConfig.from_preset(
        "tiny", text_config={"vocab_size": len(processor.tokenizer)}, projection_dim=16, **config_fields
    )
    task = {"queue_size": 16, "teacher_start_steps": 0}
    task |= {name: options.pop(name) for name in PretrainingArguments.__dataclass_fields__ if name in options}
    defaults = {"per_device_train_batch_size": 4, "report_to": "none", "texts_per_image": 1}
    return PretrainingTrainer(
        model=TripsForPreTraining(config),
        args=TripsTrainingArguments(output_dir=str(folder), disable_tqdm=True, **{**defaults, **options}),
        task_args=PretrainingArguments(**task),
        data={"train": Dataset.from_list(make_rows(20))},
        data_collator=PretrainingCollator(processor),
        processing_class=processor,
    )


def test_the_teacher_follows_each_step_of_the_optimizer(processor, tmp_path):
    options = {"max_steps": 3, "save_strategy": "no", "gradient_accumulation_steps": 2}
    trainer = make_trainer(processor, tmp_path, **options)
    trainer.teacher.momentum = 0.75
    name, parameter = next(iter(trainer.model.named_parameters()))
    history, expected = [], parameter.detach().clone()
    original = trainer.teacher.update

    def update(model, momentum):
        history.append(dict(model.named_parameters())[name].detach().clone())
        original(model, momentum)

    trainer.teacher.update = update
    trainer.train()
    assert len(history) == 3 and not torch.equal(history[0], history[2])
    for value in history:
        expected = 0.75 * expected + 0.25 * value
    torch.testing.assert_close(dict(trainer.teacher.model.named_parameters())[name], expected)


def test_the_teacher_gains_weight_over_an_epoch(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, max_steps=1, gradient_accumulation_steps=2)
    assert trainer.epoch_steps == 3  # 20 rows in batches of 4, with two batches per step

    def weights() -> list[float]:
        found = []
        for trainer.state.global_step in range(7):
            found.append(trainer.current_teacher_weight())
        return found

    assert weights() == pytest.approx([0, 0.4 / 3, 0.8 / 3, 0.4, 0.4, 0.4, 0.4])
    trainer.task_args.teacher_start_steps = None
    assert weights() == pytest.approx([0, 0, 0, 0, 0.4 / 3, 0.8 / 3, 0.4])


def test_teacher_equals_the_model_before_it_starts(processor, tmp_path):
    options = {"max_steps": 3, "save_strategy": "no", "warmup_steps": 0, "teacher_start_steps": 2}
    trainer = make_trainer(processor, tmp_path, **options)
    seen, forward = [], trainer.teacher.forward

    def watched(**inputs):
        weights = zip(trainer.teacher.model.parameters(), trainer.model.parameters())
        seen.append((trainer.state.global_step, all(torch.equal(*pair) for pair in weights)))
        return forward(**inputs)

    trainer.teacher.forward = watched
    trainer.train()
    assert seen == [(2, True)]  # only the third step calls it
    assert not torch.equal(trainer.teacher.model.itm_head.weight, trainer.model.itm_head.weight)
    assert (trainer.teacher.texts.ids != -1).sum() == 4


def test_towers_have_learning_rates_of_their_own(processor, tmp_path):
    def groups(**options) -> dict[str, tuple[float, float]]:
        """Return the learning rate and weight decay by parameter."""
        trainer = make_trainer(processor, tmp_path, max_steps=1, learning_rate=1e-4, **options)
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        found = [
            (names.pop(id(parameter)), (group["lr"], group["weight_decay"]))
            for group in trainer.create_optimizer().param_groups
            for parameter in group["params"]
        ]
        assert not names
        return dict(found)

    towers = {"vision_model": 1e-5, "text_model": 2e-5}
    expected = {}
    for name, (rate, decay) in groups().items():
        expected[name] = next((towers[part] for part in name.split(".") if part in towers), rate), decay
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
    assert trainer.teacher is None and not list(tmp_path.rglob("momentum.safetensors"))
    only_matching = {"itc_weight": 0.0, "mlm_weight": 0.0}
    assert make_trainer(processor, tmp_path, max_steps=1, config_fields=only_matching).teacher is None
