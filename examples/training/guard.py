"""Stops a training whose loss is no longer a number, and says where and what to go on from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


@dataclass
class _Batch:
    step: int
    sources: list[str]
    losses: torch.Tensor  # of all processes, (num_processes,) on the CPU, there once `copied` has happened
    copied: torch.Event | None


class LossGuard:
    """
    Raises at the first loss that is NaN or infinite, in all processes alike, naming the step, the rows of the batch
    and the last good checkpoint.

    On a CPU a loss is looked at as soon as it is known, before the optimizer makes a step of it. On an accelerator it
    is looked at when the next batch has been queued, so that the device never waits for the host.

    Args:
        accelerator (`Accelerator`)
        output_dir (`str` or `Path`): folder of the checkpoints.
    """

    def __init__(self, accelerator: Accelerator, output_dir: str | Path):
        self.accelerator, self.output_dir = accelerator, Path(output_dir)
        self.pending: _Batch | None = None

    def watch(self, loss: torch.Tensor, step: int, sources: list[str]):
        """Takes the loss of this process for a batch of rows in optimizer step `step`, counted from 1."""
        previous = self.pending
        losses = self.accelerator.gather(loss.detach().float().reshape(1))
        copied = None
        if losses.device.type != "cpu":
            losses, copied = losses.to("cpu", non_blocking=True), torch.Event(losses.device)
            copied.record()
        self.pending = _Batch(step, sources, losses, copied)
        if previous is not None:
            self._check(previous)
        if copied is None:
            self.check()

    def check(self):
        """Looks at the last loss now. To be called before anything is saved."""
        batch, self.pending = self.pending, None
        if batch is not None:
            self._check(batch)

    def _check(self, batch: _Batch):
        if batch.copied is not None:
            batch.copied.synchronize()
        if batch.losses.isfinite().all():
            return
        loss = batch.losses[self.accelerator.process_index].item()
        own = [] if torch.tensor(loss).isfinite() else [f"{loss} for the rows {', '.join(batch.sources)}"]
        checkpoint = last_good_checkpoint(self.output_dir, before=batch.step)
        go_on = "There is no good checkpoint: --save_steps writes some."
        if checkpoint is not None:
            go_on = f"The last good checkpoint is {checkpoint}: --resume_from_checkpoint {checkpoint} goes on from it."
        raise FloatingPointError(
            f"The loss of step {batch.step} is {'; '.join(gather_object(own))}. {go_on} If nothing is wrong with "
            "these rows, try a lower --learning_rate, a longer --warmup_steps, or full precision (--auto_bf16 False)."
        )


def last_good_checkpoint(output_dir: Path, before: int) -> Path | None:
    """The latest checkpoint of a step before `before` whose saved weights are all finite."""
    folders = {}
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.rpartition("-")[2]
        if step.isdecimal() and int(step) < before:
            folders[int(step)] = folder
    return next((folders[step] for step in sorted(folders, reverse=True) if _is_finite(folders[step])), None)


def _is_finite(checkpoint: Path) -> bool:
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            if not all(weights.get_tensor(name).isfinite().all() for name in weights.keys()):
                return False
    return True
