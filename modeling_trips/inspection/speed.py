"""Steps that are timed in turns, so that changes of the machine affect all."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tqdm.auto import tqdm


CLOCKS = {"wall": time.perf_counter, "process": time.process_time}  # the latter: CPU time of all threads


def seconds_in_turns(
    steps: Mapping[Any, Callable[[], object]],
    warmup: int,
    repeats: int,
    clock: str = "wall",
    device: str = "cpu",
    prepare: Callable[[], object] | None = None,
) -> dict[Any, list[float]]:
    """
    Time several steps in turns, so that changes of the machine affect all.

    Args:
        steps (`dict`): Functions by name.
        warmup (`int`): Untimed rounds.
        repeats (`int`): Timed rounds.
        clock (`str`, *optional*, defaults to `"wall"`): `"wall"`, or `"process"` for CPU time.
        device (`str`, *optional*, defaults to `"cpu"`): Device that is synchronized after each step.
        prepare (`Callable`, *optional*): Untimed function that is called before each step.

    Returns:
        `dict`: The seconds of each timed round, by the names of `steps`.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in steps}
    for round_number in tqdm(range(-warmup, repeats), desc="rounds", leave=False, disable=None):
        for name, step in steps.items():
            if prepare is not None:
                prepare()
            start = CLOCKS[clock]()
            step()
            if device != "cpu":
                torch.accelerator.synchronize()
            if round_number >= 0:
                seconds[name].append(CLOCKS[clock]() - start)
    return seconds
