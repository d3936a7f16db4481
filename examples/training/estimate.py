"""Says early how long a training will take on this machine."""

import time
from collections.abc import Callable

from tqdm.auto import tqdm
from transformers import TrainerCallback


class DurationEstimate(TrainerCallback):
    """
    Prints one line when a few steps have been timed.

    Args:
        describe (`Callable[[float], str]`): given the seconds of the steps that are left, the line.
        warmup (`int`, *optional*, defaults to 3): first steps, which allocate memory and are slower, left out.
        timed (`int`, *optional*, defaults to 12): how many steps after these are timed.
    """

    def __init__(self, describe: Callable[[float], str], warmup: int = 3, timed: int = 12):
        self.describe, self.warmup, self.timed = describe, warmup, timed
        self.start, self.first_step = 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step  # of a run that resumes

    def on_step_end(self, args, state, control, **kwargs):
        done = state.global_step - self.first_step
        if done == self.warmup:
            self.start = time.perf_counter()
        if done == self.warmup + self.timed and state.is_world_process_zero:
            seconds_per_step = (time.perf_counter() - self.start) / self.timed
            tqdm.write(self.describe(seconds_per_step * (state.max_steps - state.global_step)))  # above the bar
