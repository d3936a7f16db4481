"""The line that says how long a training takes, against steps whose time is known."""

import time

import torch
from transformers import Trainer, TrainingArguments

from trips_examples.training.estimate import DurationEstimate


class Sleeper(torch.nn.Module):
    """A model whose first steps take longer than the others, as those that allocate memory do."""

    def __init__(self, num_slow_steps: int):
        super().__init__()
        self.weight, self.num_slow_steps = torch.nn.Parameter(torch.zeros(())), num_slow_steps

    def forward(self, x, **kwargs):
        time.sleep(0.6 if self.num_slow_steps > 0 else 0.02)
        self.num_slow_steps -= 1
        return {"loss": self.weight * x.sum()}


def train(tmp_path, max_steps: int) -> list[float]:
    estimates = []
    estimate = DurationEstimate(lambda seconds: estimates.append(seconds) or f"{seconds:.0f} seconds", timed=5)
    args = TrainingArguments(tmp_path, max_steps=max_steps, report_to="none", use_cpu=True, disable_tqdm=True)
    rows = [{"x": torch.ones(1)}] * 8
    Trainer(Sleeper(num_slow_steps=3), args, train_dataset=rows, callbacks=[estimate]).train()
    return estimates


def test_times_steps_behind_the_slow_first_ones_and_multiplies_by_those_left(tmp_path, capsys):
    (seconds,) = train(tmp_path, max_steps=20)
    assert 12 * 0.02 <= seconds < 12 * 0.12  # 8 steps are done; a slow one among those timed would make it 12 * 0.136
    assert capsys.readouterr().out.count(f"{seconds:.0f} seconds\n") == 1


def test_a_training_of_fewer_steps_says_nothing(tmp_path):
    assert train(tmp_path, max_steps=7) == []
