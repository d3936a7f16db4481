"""The phases of a training: the schedule of each step."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from modeling_trips import UNPRUNED, SelectionSchedule, TripsConfig


OPTIONS = ("unpruned_share", "relevance_share", "learns_relevance", "keep_rates")


def check_phases(config: TripsConfig, args: TrainingArguments):
    """
    Let pruned steps teach relevance or not, and turn it off where it is a default and cannot be learnt.

    Raises:
        ValueError: It is asked for there, or rates do not fit the schedule.
    """
    schedule = config.vision_config.schedule
    if args.keep_rates and len(schedule.layers) != 1:
        raise ValueError(f"--keep_rates needs a --schedule of one layer, whose rate it replaces, got {schedule}.")
    if "relevance_share" in args.typed and args.relevance_share > 0 and args.unpruned_share == 0:
        raise ValueError("--relevance_share is a share of the unpruned steps. Give --unpruned_share, or leave it out.")
    reason = None
    if config.fusion_type == "single_stream":
        reason = "a fusion encoder, got --fusion_type single_stream"
    elif schedule.layers and not schedule.scoring().layers:
        reason = f"a --schedule with a layer that the text or the image scores, got {schedule}"
    if reason is not None:
        for name in ("relevance_share", "learns_relevance"):
            if name in args.typed and getattr(args, name):
                raise ValueError(f"--{name} needs {reason}. Give 0.")
        args.relevance_share = 0.0
        args.learns_relevance = False
    config.learns_relevance = args.learns_relevance


def options_of_phases(args: TrainingArguments) -> dict[str, Any]:
    """Return the options of a training that decide its phases, by name."""
    return {name: getattr(args, name) for name in OPTIONS}


@dataclass(frozen=True)
class Phases:
    """
    The phases of a training: unpruned steps, in the last of which the scores learn relevance, then pruned steps.
    Steps are numbered from 1.

    Args:
        schedule ([`SelectionSchedule`]): That of the model.
        max_steps (`int`): Steps of the training.
        unpruned_share (`float`): Share of first steps that run unpruned. The last step is pruned.
        relevance_share (`float`): Share of the unpruned steps, the last ones, in which the scores learn relevance.
        learns_relevance (`bool`): Whether they learn it in the pruned steps, too.
        keep_rates (`Sequence[float]`): Rates of which each pruned step draws one. Empty: the schedule's.
        seed (`int`): Seed of these draws, which depend on nothing but it and the step.
    """

    schedule: SelectionSchedule
    max_steps: int
    unpruned_share: float = 0.0
    relevance_share: float = 0.0
    learns_relevance: bool = False
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
        if self.unpruned_steps:
            rates.add(1.0)
        return sorted(rates)

    @property
    def first_relevance_step(self) -> int | None:
        """The first step in which scores learn relevance, if there is one."""
        if not self.schedule.scoring().layers:
            return None
        relevance_steps = round(self.relevance_share * self.unpruned_steps)
        if relevance_steps > 0 or self.learns_relevance:
            return self.unpruned_steps - relevance_steps + 1
        return None

    def schedule_of(self, step: int) -> SelectionSchedule:
        """Return the schedule of a step. An unpruned one that teaches relevance has layers that score."""
        if step <= self.unpruned_steps:
            first = self.first_relevance_step
            return UNPRUNED if first is None or step < first else self.schedule.scoring()
        if not self.keep_rates:
            return self.schedule
        keep_rate = random.Random(f"{self.seed} {step}").choice(self.keep_rates)
        return self.schedule.with_keep_rate(keep_rate)

    def evaluated_after(self, step: int) -> SelectionSchedule:
        """Return the schedule of an evaluation after a step: unpruned, or the model's."""
        return UNPRUNED if 0 < step <= self.unpruned_steps else self.schedule

    def __str__(self) -> str:
        if not self.schedule.layers:
            return str(self.schedule)
        parts = []
        if self.unpruned_steps:
            parts.append(f"steps 1 to {self.unpruned_steps} unpruned")
        if self.first_relevance_step is not None:
            last = "on" if self.learns_relevance else f"to {self.unpruned_steps}"
            parts.append(f"from step {self.first_relevance_step} {last} the scores learn which patches matter")
        pruned = f"then {self.schedule}" if self.unpruned_steps else str(self.schedule)
        if self.keep_rates:
            pruned += f" with rates of {', '.join(f'{rate:g}' for rate in self.keep_rates)}"
        return ", ".join([*parts, pruned])
