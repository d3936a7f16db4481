"""Checks during training: stop at a loss that is not finite, and report problems of the selection."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors import safe_open
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import sort_checkpoints

from modeling_trips import (
    UNPRUNED,
    TripsConfig,
    TripsForQuestionAnswering,
    TripsForVisualGrounding,
    TripsModel,
    use_schedule,
)
from modeling_trips.inspection.cost import forward_cost
from modeling_trips.inspection.speed import seconds_of_both
from trips_examples.analysis.comparison import Group, compare, join
from trips_examples.data.collators import ImageBatchCollator
from trips_examples.data.rows import image_size
from trips_examples.data.task_collators import a_text_per_image
from trips_examples.metrics.selection import NUM_ROWS, measure_selection, regions_of
from trips_examples.training.predictions import texts_of


logger = logging.getLogger(__name__)

# Thresholds. The bundled model has an entropy of 0.73, a text sensitivity of 0.70 and a z above 30.
LEAST_ENTROPY = 0.02
LEAST_SENSITIVITY = 0.01
LEAST_Z = 2.0  # standard errors above chance
CHANCE_MARGIN = 0.02  # for the overlap of kept patches
MOST_TIME = 1.1  # time ratio against the unpruned baseline
MOST_CHANCE = 0.01  # p-value
SMALL = 1 / 16  # largest share of the image for fine detail

SUPERVISE = "--selection_loss_weight, --selection_teacher"


class Finding(NamedTuple):
    """Problem of the selection. Each kind is reported once per run and layer."""

    kind: str
    words: str


@dataclass
class _Batch:
    step: int
    sources: list[str]
    losses: torch.Tensor  # of all processes, (num_processes,) on the CPU, valid after `copied`
    copied: torch.Event | None


class TrainingMonitor(TrainerCallback):
    """
    Callback that checks the loss and the selection.

    - The first loss that is NaN or infinite stops all processes. The error names the step, the rows of the batch and
      the last good checkpoint. On an accelerator a loss is read after the next batch is queued, so the device does not
      wait.
    - Every `health_steps` the selection is examined on the first rows of the evaluation data, or of the training data.
      The metrics of `measure_selection` are logged as `selection_layer2_entropy` and so on, and once
      `selection_time_ratio` and `selection_macs_ratio` against the unpruned baseline. From half of the training on,
      each problem is reported once, and for data with regions `selection_small_accuracy` and
      `selection_small_accuracy_unpruned` are logged. Not supported under FSDP and ZeRO-3.

    Args:
        trainer (`Trainer`): Trainer of a TRIPS model with a [`TripsProcessor`].
        health_steps (`float`): Steps between two checks; below 1, a share of all steps; 0 disables the checks.
    """

    def __init__(self, trainer: Trainer, health_steps: float):
        in_pieces = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        makes_batches = isinstance(trainer.data_collator, ImageBatchCollator)
        self.trainer, self.health_steps = trainer, 0.0 if in_pieces or not makes_batches else health_steps
        self.accelerator = trainer.accelerator
        self.pending: _Batch | None = None
        self.is_timed = False
        self.reported: set[tuple[str, int | None]] = set()

    # The loss

    def watch_loss(self, loss: torch.Tensor, step: int, sources: list[str]):
        """Record the loss of this process for a batch in optimizer step `step`, from 1."""
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
            self.check_loss()

    def check_loss(self):
        """Check the last loss before a checkpoint is saved."""
        batch, self.pending = self.pending, None
        if batch is not None:
            self._check(batch)

    def _check(self, batch: _Batch):
        if batch.copied is not None:
            batch.copied.synchronize()
        if batch.losses.isfinite().all():
            return
        loss = batch.losses[self.accelerator.process_index].item()
        own = [] if math.isfinite(loss) else [f"{loss} for the rows {', '.join(batch.sources)}"]
        checkpoint = last_good_checkpoint(Path(self.trainer.args.output_dir), before=batch.step)
        resume = "No good checkpoint was saved (--save_steps)."
        if checkpoint is not None:
            resume = f"Resume from the last good checkpoint with --resume_from_checkpoint {checkpoint}."
        raise FloatingPointError(
            f"The loss of step {batch.step} is {'; '.join(gather_object(own))}. {resume} If the rows are fine, try a "
            "lower --learning_rate, a longer --warmup_steps, or float32."
        )

    # The selection

    @property
    def dataset(self) -> Dataset | None:
        """Data for the checks."""
        datasets = (self.trainer.eval_dataset, self.trainer.train_dataset)
        return next((dataset for dataset in datasets if isinstance(dataset, Dataset) and len(dataset)), None)

    def on_step_end(self, args, state, control, **kwargs):
        if self.health_steps == 0:
            return
        every = math.ceil(state.max_steps * self.health_steps) if self.health_steps < 1 else int(self.health_steps)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            should_log = control.should_log
            self.examine(is_late=2 * state.global_step >= state.max_steps)
            control.should_log = should_log  # keep the trainer's own logging

    def examine(self, is_late: bool = True):
        """Examine the selection, and report problems if `is_late`."""
        head = self.accelerator.unwrap_model(self.trainer.model)
        model = head.base_model
        if self.dataset is None or not model.config.vision_config.schedule.layers:
            return
        rows = [self.dataset[row] for row in range(min(NUM_ROWS, len(self.dataset)))]
        was_training = head.training
        head.eval()
        with self.accelerator.autocast():
            metrics, findings = self._examine_layers(model, rows)
            if not self.is_timed:
                self.is_timed = True
                timing, of_time = self._measure_time(model)
                metrics |= timing
                self._report(None, of_time)
        if is_late and (small := compare_small_things(self.trainer, rows)):
            metrics |= {"small_accuracy": small.accuracy, "small_accuracy_unpruned": small.other_accuracy}
            self._report(None, detail_findings(small))
        head.train(was_training)
        self.trainer.log({f"selection_{name}": value for name, value in metrics.items()})
        if is_late:
            for layer, of_layer in findings.items():
                self._report(layer, of_layer)

    def _inputs(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        return a_text_per_image(self.trainer.data_collator(rows))

    def _examine_layers(
        self, model: TripsModel, rows: list[dict]
    ) -> tuple[dict[str, float], dict[int, list[Finding]]]:
        inputs = self._inputs(rows)
        metrics = measure_selection(model, inputs, rows, self.trainer.processing_class)
        num_patches = math.prod(inputs["pixel_values"].shape[-2:]) // self.trainer.processing_class.patch_size**2
        texts_differ = _differ(rows, inputs["image_index"].tolist())
        findings = {}
        for layer, selection in model.config.vision_config.schedule.by_layer.items():
            prefix = f"layer{layer}_"
            own = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
            findings[layer] = list(layer_findings(layer, selection.guidance, own, num_patches, texts_differ))
        return metrics, findings

    def _measure_time(self, model: TripsModel) -> tuple[dict[str, float], Iterator[Finding]]:
        inputs = {name: tensor.to(model.device) for name, tensor in self._inputs(self._rows_of_a_batch()).items()}
        texts_per_image = len(inputs["image_index"]) / len(inputs["pixel_values"])
        pruned, unpruned = seconds_of_both(model, inputs)
        macs = macs_ratio(model.config, inputs["input_ids"].shape[1], texts_per_image)
        metrics = {"time_ratio": pruned / unpruned, "macs_ratio": macs}
        return metrics, time_findings(pruned / unpruned, macs, texts_per_image)

    def _rows_of_a_batch(self) -> list[dict]:
        """Return rows grouped as in a training batch."""
        args, counts, rows = self.trainer.args, defaultdict(int), []
        for row in self.dataset:
            image = row.get("image_id") or tuple(row["image_ids"])
            counts[image] += 1
            if counts[image] <= args.texts_per_image:
                rows.append(row)
            if len(rows) == args.per_device_train_batch_size:
                break
        return rows

    def _report(self, layer: int | None, findings: Iterable[Finding]):
        for finding in findings:
            if (finding.kind, layer) not in self.reported:
                self.reported.add((finding.kind, layer))
                if self.trainer.args.should_log:
                    logger.warning(finding.words)


def last_good_checkpoint(output_dir: Path, before: int) -> Path | None:
    """Return the latest checkpoint of a step before `before` whose weights are all finite."""
    for folder in map(Path, reversed(sort_checkpoints(str(output_dir)))):
        step = folder.name.rpartition("-")[2]
        if step.isdecimal() and int(step) < before and _is_finite(folder):
            return folder
    return None


def _is_finite(checkpoint: Path) -> bool:
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            if not all(weights.get_tensor(name).isfinite().all() for name in weights.keys()):
                return False
    return True


def _differ(rows: list[dict], image_index: list[int]) -> bool:
    """Return whether texts of an image may be about different things."""
    regions = regions_of(rows)
    if not regions:
        return True
    by_image = defaultdict(set)
    for number, region in regions.items():
        by_image[image_index[number]].add(tuple(region))
    return any(len(different) > 1 for different in by_image.values())


def layer_findings(
    layer: int, guidance: str, metrics: dict[str, float], num_patches: int, texts_differ: bool
) -> Iterator[Finding]:
    """
    Yield the problems of a selection layer.

    Args:
        layer (`int`), guidance (`str`): Number of the layer from 1, and its guidance.
        metrics (`dict[str, float]`): Metrics of `measure_selection` without the layer's name.
        num_patches (`int`): Patches of the grid.
        texts_differ (`bool`): Some texts of an image may be about different things.
    """
    if guidance == "random":
        return
    title = f"Selection layer {layer} (scored by the {guidance})"
    if metrics["entropy"] < LEAST_ENTROPY:
        yield Finding(
            "one patch",
            f"{title} gives all scores to one patch (entropy {metrics['entropy']:.3f} of at most 1). Try a lower "
            "--learning_rate, a longer --warmup_steps, or a later layer.",
        )
    sensitivity, z = metrics.get("text_sensitivity"), metrics.get("patch_precision_z")
    if metrics.get("image_sensitivity", 1.0) < LEAST_SENSITIVITY:
        yield Finding(
            "same places",
            f"{title} keeps the same patches of every image (overlap {1 - metrics['image_sensitivity']:.1%}). Try a "
            f"later layer, a higher --keep_rate, or selection supervision ({SUPERVISE}).",
        )
    elif guidance != "text":
        return
    elif texts_differ and sensitivity is not None and sensitivity < LEAST_SENSITIVITY:
        yield Finding(
            "text ignored",
            f"{title} keeps the same patches for every text (overlap among the texts of an image "
            f"{1 - sensitivity:.1%}). Try selection supervision ({SUPERVISE}) or --selection_guidance image.",
        )
    elif z is not None and z < LEAST_Z:
        yield Finding(
            "random",
            f"{title} selects at random: the patch precision is {metrics['patch_precision']:.1%}, {z:.1f} standard "
            f"errors from random selection. Train longer, supervise the selection ({SUPERVISE}), or start from "
            "trained weights.",
        )
    elif z is None and sensitivity is not None and _is_at_chance(metrics, num_patches):
        yield Finding(
            "random",
            f"{title} selects at random: the kept patches of two texts of an image overlap as little as random ones "
            f"({1 - sensitivity:.1%}). Train longer, use --selection_teacher, or start from trained weights.",
        )


def _is_at_chance(metrics: dict[str, float], num_patches: int) -> bool:
    share = metrics["kept"] / num_patches
    overlap_at_random = share / (2 - share)  # Jaccard index of two random sets of that size
    sensitivities = (metrics["text_sensitivity"], metrics.get("image_sensitivity", 0.0))
    return all(abs(1 - each - overlap_at_random) < CHANCE_MARGIN for each in sensitivities)


def time_findings(time_ratio: float, macs: float, texts_per_image: float) -> Iterator[Finding]:
    """Yield a finding if the forward pass takes longer than that of the unpruned baseline."""
    if time_ratio <= MOST_TIME:
        return
    remedy = (
        "Texts share the unpruned vision tower. Find a cheaper schedule with plan_selection.py."
        if macs >= 1
        else "The model and the batch are too small for a speedup. Use larger ones, or --keep_rate 1.0."
    )
    yield Finding(
        "time",
        f"Pruning costs time: a forward pass takes {time_ratio:.2f} times as long as that of the unpruned baseline, "
        f"at a MAC ratio of {macs:.2f} and {texts_per_image:.1f} text(s) per image. {remedy}",
    )


def detail_findings(small: Group) -> Iterator[Finding]:
    """Yield a finding if the unpruned baseline is better at fine detail, by McNemar's test."""
    if small.lost <= small.won or small.p_value >= MOST_CHANCE:
        return
    yield Finding(
        "fine detail",
        f"Pruning costs fine detail: accuracy on {small.count} texts about at most 1/{round(1 / SMALL)} of the image "
        f"is {small.accuracy:.1%}, against {small.other_accuracy:.1%} unpruned (p = {small.p_value:.2g}). Try a "
        f"higher --keep_rate, later --selection_layers, larger images, or selection supervision ({SUPERVISE}).",
    )


def macs_ratio(config: TripsConfig, text_length: int, texts_per_image: float) -> float:
    """Return the MAC ratio (pruned / unpruned) of text encoder, vision tower and fusion encoder."""
    pruned, unpruned = (forward_cost(config, text_length, schedule) for schedule in (None, UNPRUNED))
    return pruned.macs(texts_per_image) / unpruned.macs(texts_per_image)


def small_things(rows: list[dict]) -> list[dict]:
    """Return the rows whose `region` or `box` is at most a sixteenth of the image."""
    small = []
    for number, (x0, y0, x1, y1) in regions_of(rows).items():
        height, width = image_size(rows[number])
        if (x1 - x0) * (y1 - y0) <= SMALL * height * width:
            small.append(rows[number])
    return small


def compare_small_things(trainer: Trainer, rows: list[dict]) -> Group | None:
    """
    Compare the model in evaluation mode with its unpruned baseline on the rows about small things.

    Returns:
        [`Group`]: Both accuracies and McNemar's test. None without such rows, and for tasks other than question
        answering and grounding.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    rows = small_things(rows)
    if not rows or not isinstance(model, (TripsForQuestionAnswering, TripsForVisualGrounding)):
        return None
    own = _predicted(trainer, rows)
    with use_schedule(model, UNPRUNED):
        return compare(join(own, _predicted(trainer, rows))).overall


def _predicted(trainer: Trainer, rows: list[dict]) -> list[dict]:
    size, predicted = trainer.args.per_device_eval_batch_size, []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        _, output, _ = trainer.prediction_step(trainer.model, trainer.data_collator(batch), prediction_loss_only=False)
        if "answers" in batch[0]:
            predictions = texts_of(output.cpu().numpy(), trainer.processing_class)
        else:
            sizes = [image_size(row) for row in batch]
            predictions = trainer.processing_class.post_process_grounding(output, sizes).tolist()
        predicted += [{**row, "prediction": prediction} for row, prediction in zip(batch, predictions)]
    return predicted
