"""Monitoring of a training: stop at values that are not finite, and log how the selection develops."""

import math
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from trips_examples.data.collators import a_text_per_image
from trips_examples.metrics.selection import NUM_ROWS, measure_selection


LOGGED = ("entropy", "text_sensitivity", "image_sensitivity", "patch_precision", "region_recall")


class Watched(NamedTuple):
    """A value of each process, or one of all, to be checked."""

    name: str
    step: int
    sources: list[str]
    values: torch.Tensor  # on the CPU, valid after `copied`
    copied: torch.Event | None


class TrainingMonitor(TrainerCallback):
    """
    Callback that stops all processes at the first loss, gradient norm or metric of an evaluation that is not finite,
    and every `health_steps` logs the metrics `LOGGED` of the last selection layer on the first rows of the evaluation
    data, or of the training data, as `selection_entropy` and so on.

    Args:
        trainer (`Trainer`): Trainer of a TRIPS model with a [`TripsProcessor`].
        health_steps (`float`): Steps between two measurements; below 1, a share of all steps; 0: none. Sharded models
            (FSDP, ZeRO-3) are not measured.
    """

    def __init__(self, trainer: Trainer, health_steps: float):
        is_sharded = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        self.trainer, self.health_steps = trainer, 0 if is_sharded else health_steps
        self.pending: list[Watched] = []

    def watch(self, name: str, values: torch.Tensor, step: int, sources: list[str] | None = None):
        """
        Check the values of all processes, or their common one, of optimizer step `step`, from 1. On an accelerator
        they are checked in the next step, after its batch is queued, so that the device does not wait.
        """
        values, copied = values.detach().float().reshape(-1), None
        if values.device.type != "cpu":
            values, copied = values.to("cpu", non_blocking=True), torch.Event(values.device)
            copied.record()
        self.pending.append(Watched(name, step, sources or [], values, copied))
        self.check(before=math.inf if copied is None else step)

    def check(self, before: float = math.inf):
        """Raise a `FloatingPointError` if a watched value of a step before this one is not finite."""
        while self.pending and self.pending[0].step < before:
            watched = self.pending.pop(0)
            if watched.copied is not None:
                watched.copied.synchronize()
            if not watched.values.isfinite().all():
                self._stop(watched)

    def _stop(self, watched: Watched):
        value = watched.values[min(self.trainer.accelerator.process_index, len(watched.values) - 1)].item()
        rows = f" for the rows {', '.join(watched.sources)}" if watched.sources else ""
        own = [] if math.isfinite(value) else [f"{value}{rows}"]
        raise FloatingPointError(
            f"The {watched.name} of step {watched.step} is {'; '.join(gather_object(own))}. Resume from a checkpoint "
            "(--resume_from_checkpoint last), and if the rows are fine with a lower --learning_rate, a longer "
            "--warmup_steps or in float32."
        )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        check_metrics(metrics or {}, state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.health_steps == 0:
            return
        every = math.ceil(state.max_steps * self.health_steps) if self.health_steps < 1 else int(self.health_steps)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            should_log = control.should_log
            self.trainer.log(self.measure())
            control.should_log = should_log  # keep the trainer's own logging

    def measure(self) -> dict[str, float]:
        """Return the metrics to log; none without a selection or rows."""
        datasets = (self.trainer.eval_dataset, self.trainer.train_dataset)
        rows = next((rows for rows in datasets if isinstance(rows, Dataset) and len(rows)), None)
        head = self.trainer.accelerator.unwrap_model(self.trainer.model)
        layers = head.config.vision_config.schedule.layers
        if rows is None or not layers:
            return {}
        rows, was_training = [rows[row] for row in range(min(NUM_ROWS, len(rows)))], head.training
        with self.trainer.accelerator.autocast():
            inputs = a_text_per_image(self.trainer.data_collator(rows))
            metrics = measure_selection(head.eval().base_model, inputs, rows, self.trainer.processing_class)
        head.train(was_training)
        names = {name: f"layer{layers[-1]}_{name}" for name in LOGGED}
        return {f"selection_{name}": metrics[key] for name, key in names.items() if key in metrics}


def check_metrics(metrics: dict[str, float], step: int):
    """Raise a `FloatingPointError` that names the metrics that are not finite."""
    broken = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        raise FloatingPointError(f"The evaluation after step {step} is not finite in {', '.join(broken)}.")
