"""The phases of a training: the schedules of each step, one for each of its passes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from modeling_trips import UNPRUNED, SelectionSchedule, TripsConfig


OPTIONS = ("unpruned_share", "relevance_share", "relevance_interval", "keep_rates")


def check_phases(config: TripsConfig, args: TrainingArguments):
    """
    Turn relevance off where it is a default and cannot be learnt.

    Raises:
        ValueError: It is asked for there, or rates do not fit the schedule.
    """
    schedule = config.vision_config.schedule
    if args.keep_rates and len(schedule.layers) != 1:
        raise ValueError(f"--keep_rates needs a --schedule of one layer, whose rate it replaces, got {schedule}.")
    if args.deepspeed_plugin is not None and args.relevance_interval > 0:
        if "relevance_interval" in args.typed:
            raise ValueError("--relevance_interval needs two passes in a step, which DeepSpeed has not. Give 0.")
        args.relevance_interval = 0
    reason = None
    if config.fusion_type == "single_stream":
        reason = "a fusion encoder, got --fusion_type single_stream"
    elif schedule.layers and not schedule.scoring().layers:
        reason = f"a --schedule with a layer that the text or the image scores, got {schedule}"
    if reason is None:
        return
    for name in ("relevance_share", "relevance_interval"):
        if name in args.typed and getattr(args, name) > 0:
            raise ValueError(f"--{name} needs {reason}. Give 0.")
        setattr(args, name, 0)


def options_of_phases(args: TrainingArguments) -> dict[str, Any]:
    """Return the options of a training that decide its phases, by name."""
    return {name: getattr(args, name) for name in OPTIONS}


@dataclass(frozen=True)
class Phases:
    """
    The phases of a training: unpruned steps, in the last of which the scores learn relevance, then pruned steps, of
    which every `relevance_interval`-th also runs unpruned and teaches the same. Steps are numbered from 1.

    Args:
        schedule ([`SelectionSchedule`]): That of the model.
        max_steps (`int`): Steps of the training.
        unpruned_share (`float`): Share of first steps that run unpruned. The last step is pruned.
        relevance_share (`float`): Share of the unpruned steps, the last ones, in which the scores learn relevance.
        relevance_interval (`int`): The first of so many pruned steps also runs unpruned, with relevance. 0: none.
        keep_rates (`Sequence[float]`): Rates of which each pruned step draws one. Empty: the schedule's.
        seed (`int`): Seed of these draws, which depend on nothing but it and the step.
    """

    schedule: SelectionSchedule
    max_steps: int
    unpruned_share: float = 0.0
    relevance_share: float = 0.0
    relevance_interval: int = 0
    keep_rates: Sequence[float] = ()
    seed: int = 0

    @property
    def unpruned_steps(self) -> int:
        """Number of first steps that run unpruned."""
        if not self.schedule.layers:
            return 0
        return max(0, min(round(self.unpruned_share * self.max_steps), self.max_steps - 1))

    @property
    def trained_keep_rates(self) -> list[float] | None:
        """The keep rates of its steps, ascending, with 1.0 for unpruned ones; `None` if there is not one layer."""
        if len(self.schedule.layers) != 1:
            return None
        rates = set(self.keep_rates or [self.schedule.selections[0].keep_rate])
        if self.unpruned_steps or self.relevance_interval:
            rates.add(1.0)
        return sorted(rates)

    @property
    def first_relevance_step(self) -> int | None:
        """The first step in which scores learn relevance, if there is one."""
        if not self.schedule.scoring().layers:
            return None
        relevance_steps = round(self.relevance_share * self.unpruned_steps)
        if relevance_steps > 0:
            return self.unpruned_steps - relevance_steps + 1
        return self.unpruned_steps + 1 if self.relevance_interval > 0 else None

    def schedules_of(self, step: int) -> list[SelectionSchedule]:
        """Return the schedule of each pass of a step. An unpruned one that teaches relevance has layers that score."""
        pruned_step = step - self.unpruned_steps  # from 1
        scoring = self.schedule.scoring()
        if pruned_step <= 0:
            first = self.first_relevance_step
            return [UNPRUNED if first is None or step < first else scoring]
        schedule = self.schedule
        if self.keep_rates:
            keep_rate = random.Random(f"{self.seed} {step}").choice(self.keep_rates)
            schedule = schedule.with_keep_rate(keep_rate)
        if self.relevance_interval > 0 and scoring.layers and (pruned_step - 1) % self.relevance_interval == 0:
            return [schedule, scoring]
        return [schedule]

    def evaluated_after(self, step: int) -> SelectionSchedule:
        """Return the schedule of an evaluation after a step: unpruned, or the model's."""
        return UNPRUNED if 0 < step <= self.unpruned_steps else self.schedule

    def __str__(self) -> str:
        if not self.schedule.layers:
            return str(self.schedule)
        parts = []
        if self.unpruned_steps:
            parts.append(f"steps 1 to {self.unpruned_steps} unpruned")
            if self.first_relevance_step is not None and self.first_relevance_step <= self.unpruned_steps:
                parts.append(f"from step {self.first_relevance_step} on the scores learn which patches matter")
        pruned = f"then {self.schedule}" if parts else str(self.schedule)
        if self.keep_rates:
            pruned += f" with rates of {', '.join(f'{rate:g}' for rate in self.keep_rates)}"
        if self.relevance_interval:
            pruned += f", one step in {self.relevance_interval} also unpruned, from which the scores learn the same"
        return ", ".join([*parts, pruned])
