"""A loss that is no number stops the run, and says what to go on from."""

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import save_file

from trips_examples.training.guard import LossGuard, last_good_checkpoint
from trips_examples.training.options import TripsTrainingArguments
from trips_examples.training.trainer import ImageGroupedTrainer


def save_weights(folder, value: float):
    folder.mkdir(parents=True)
    save_file({"fine": torch.ones(2), "weight": torch.tensor([1.0, value])}, folder / "model.safetensors")


def test_the_last_good_checkpoint_is_the_latest_before_the_step_with_finite_weights(tmp_path):
    assert last_good_checkpoint(tmp_path, before=10) is None
    save_weights(tmp_path / "checkpoint-9", 1.0)
    save_weights(tmp_path / "checkpoint-10", float("nan"))
    save_weights(tmp_path / "checkpoint-12", 1.0)
    assert last_good_checkpoint(tmp_path, before=11) == tmp_path / "checkpoint-9"  # 10 as text is before 9
    assert last_good_checkpoint(tmp_path, before=12) == tmp_path / "checkpoint-9"
    assert last_good_checkpoint(tmp_path, before=13) == tmp_path / "checkpoint-12"
    assert last_good_checkpoint(tmp_path, before=9) is None


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_the_guard_names_step_rows_and_checkpoint_of_a_loss_that_is_no_number(loss, tmp_path):
    guard = LossGuard(Accelerator(cpu=True), tmp_path)
    save_weights(tmp_path / "checkpoint-6", 1.0)
    guard.watch(torch.tensor(1e30), 6, ["a row 1"])
    with pytest.raises(FloatingPointError) as error:
        guard.watch(torch.tensor(loss), 7, ["a row 2", "b row 3"])
    assert f"step 7 is {loss} for the rows a row 2, b row 3." in str(error.value)
    assert f"--resume_from_checkpoint {tmp_path / 'checkpoint-6'} " in str(error.value)
    with pytest.raises(FloatingPointError, match="There is no good checkpoint"):
        LossGuard(Accelerator(cpu=True), tmp_path / "empty").watch(torch.tensor(loss), 1, [])


def test_gradients_that_are_no_numbers_are_found_at_the_next_loss_and_their_checkpoint_is_not_good(tmp_path):
    """The loss of step 1 is fine, its gradient is not: the weights of checkpoint-1 are no numbers."""

    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, labels):
            return {"loss": (self.weight * x).abs().sqrt().sum()}

        def unused_parameters(self):
            return []

    rows = [{"image_ids": ["a", "b"], "x": 1.0, "source": f"row {i}"} for i in range(4)]
    args = TripsTrainingArguments(
        output_dir=str(tmp_path), max_steps=4, save_steps=1, per_device_train_batch_size=1, auto_bf16=False
    )

    def collator(rows):
        x = torch.tensor([row["x"] for row in rows])
        return {"x": x, "labels": x, "sources": [row["source"] for row in rows]}

    trainer = ImageGroupedTrainer(Root(), args, train_dataset=Dataset.from_list(rows), train_collator=collator)
    with pytest.raises(FloatingPointError, match=r"step 2 is nan for the rows row \d\. There is no good checkpoint"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
