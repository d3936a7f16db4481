"""Says in a training, in words, when the selection is not healthy, and what to try."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from modeling_trips import UNPRUNED, TripsConfig, TripsModel
from modeling_trips.inspection.cost import forward_cost
from modeling_trips.inspection.speed import seconds_of_both
from trips_examples.analysis.comparison import Group
from trips_examples.data.task_collators import a_text_per_image
from trips_examples.metrics.selection import NUM_ROWS, measure_selection, regions_of
from trips_examples.training.fine_detail import SMALL, compare_with_twin


logger = logging.getLogger(__name__)

# A healthy model is far from each: the shipped one has an entropy of 0.14, a text sensitivity of 0.06, a z above 10.
LEAST_ENTROPY = 0.02
LEAST_SENSITIVITY = 0.01
LEAST_Z = 2.0  # standard errors above chance
CHANCE_MARGIN = 0.02  # of the overlap of kept sets
MOST_TIME = 1.1  # of the unpruned model's
MOST_CHANCE = 0.01  # that the unpruned model is ahead on small things by chance


class Finding(NamedTuple):
    """A kind, which is told once per run and layer, and the value, what it means and what to try, in words."""

    kind: str
    words: str


@dataclass(frozen=True)
class LayerHealth:
    """
    What a selection layer does with the examined rows.

    Args:
        layer (`int`), guidance (`str`): its number, from 1, and who ranks its tokens.
        metrics (`dict[str, float]`): as `measure_selection` gives them, without the name of the layer.
        num_patches (`int`): of the grid.
        texts_differ (`bool`): whether some texts of an image are, as far as is known, about different things.
    """

    layer: int
    guidance: str
    metrics: dict[str, float]
    num_patches: int
    texts_differ: bool

    def findings(self) -> Iterator[Finding]:
        """What is wrong with it. Random guidance is what it says, and has nothing to be said about."""
        if self.guidance == "random":
            return
        title = f"Layer {self.layer}, guided by the {self.guidance},"
        if self.metrics["entropy"] < LEAST_ENTROPY:
            yield Finding(
                "one patch",
                f"{title} gives all scores to one patch (entropy {self.metrics['entropy']:.3f} of at most 1): the "
                "others are kept by chance. Try a lower --learning_rate or a longer --warmup_steps, or select in a "
                "later layer.",
            )
        if self.metrics.get("image_sensitivity", 1.0) < LEAST_SENSITIVITY:
            overlap = 1 - self.metrics["image_sensitivity"]
            yield Finding(
                "same places",
                f"{title} keeps the same patches of every image (overlap {overlap:.1%}): it goes by their place, not "
                "by what they show. Try a later layer, a higher --keep_rate, or, where the data know regions, a "
                "higher --selection_loss_weight.",
            )
        elif self.guidance == "text":
            yield from self._findings_of_text(title)

    def _findings_of_text(self, title: str) -> Iterator[Finding]:
        sensitivity, z = self.metrics.get("text_sensitivity"), self.metrics.get("inside_z")
        if self.texts_differ and sensitivity is not None and sensitivity < LEAST_SENSITIVITY:
            yield Finding(
                "deaf",
                f"{title} keeps the same patches whatever the text says (overlap among the texts of an image "
                f"{1 - sensitivity:.1%}). A text costs a pass of its own here and chooses nothing: teach it "
                "(--selection_loss_weight, --selection_teacher), or let the image guide (--selection_guidance image).",
            )
        elif z is not None and z < LEAST_Z:
            yield Finding(
                "random",
                f"{title} chooses no better than chance: {self.metrics['inside']:.1%} of what it keeps lies inside "
                f"what the text is about, {z:.1f} standard errors from a random choice. Train longer, teach it "
                "(--selection_loss_weight, --selection_teacher), or start from weights that know words and images.",
            )
        elif z is None and sensitivity is not None and self._is_at_chance:
            yield Finding(
                "random",
                f"{title} chooses as if at random: what it keeps for two texts of an image overlaps "
                f"({1 - sensitivity:.1%}) as little as for two images, and as random sets would "
                f"({self._overlap_at_random:.1%}). Train longer, teach it (--selection_teacher), or start from "
                "weights that know words and images.",
            )

    @property
    def _overlap_at_random(self) -> float:
        """The Jaccard index of two random sets of that size."""
        share = self.metrics["kept"] / self.num_patches
        return share / (2 - share)

    @property
    def _is_at_chance(self) -> bool:
        sensitivities = (self.metrics["text_sensitivity"], self.metrics.get("image_sensitivity", 0.0))
        return all(abs(1 - each - self._overlap_at_random) < CHANCE_MARGIN for each in sensitivities)


def costs_time(time_ratio: float, counted: float, texts_per_image: float) -> Iterator[Finding]:
    """Whether pruning takes longer than it would to leave it out, by the clock of this machine."""
    if time_ratio <= MOST_TIME:
        return
    why = (
        "the unpruned model shares its vision tower among them: plan_selection.py finds a schedule that costs less, "
        "such as the image guiding early and the text late"
        if counted >= 1
        else "models and batches this small are not limited by their arithmetic: larger images, models or batches "
        "are, and --keep_rate 1.0 is faster here"
    )
    yield Finding(
        "time",
        f"Pruning costs time here: a forward pass takes {time_ratio:.2f} times as long as that of the unpruned model, "
        f"with {counted:.2f} of its counted work, at {texts_per_image:.1f} text(s) per image: {why}.",
    )


def costs_detail(small: Group) -> Iterator[Finding]:
    """Whether what is small comes out right more often without pruning; beyond chance, as answers change both ways."""
    if small.lost <= small.won or small.p_value >= MOST_CHANCE:
        return
    yield Finding(
        "fine detail",
        f"Fine detail suffers: of {small.count} texts about something of at most 1/{round(1 / SMALL)} of the image, "
        f"{small.accuracy:.1%} come out right, and {small.other_accuracy:.1%} with the same weights unpruned (by "
        f"chance once in {1 / small.p_value:,.0f} times). Try a higher --keep_rate, later --selection_layers, larger "
        "images (--image_size), or teach the choice (--selection_loss_weight, --selection_teacher).",
    )


class SelectionHealth(TrainerCallback):
    """
    Examines the selection every `health_steps` of a training: logs what `measure_selection` finds in the first rows
    of the evaluation data (or else of the training data), as `selection_layer2_entropy` and so on, to all trackers of
    the run, once also `selection_time_ratio` and `selection_macs_ratio`, the forward pass of a batch against that of
    the unpruned model. From half of the training on, warns once of each thing that is wrong, and where the data know
    regions also logs `selection_small_accuracy` and `selection_small_accuracy_unpruned`.

    Nothing is drawn at random. Not for models in pieces (FSDP, ZeRO-3), nor for a stream without evaluation data.

    Args:
        trainer (`Trainer`): with a TRIPS model and a [`TripsProcessor`].
        steps (`float`): steps between two looks; below 1, their share of all steps.
    """

    def __init__(self, trainer: Trainer, steps: float):
        self.trainer, self.steps = trainer, steps
        self.is_timed = False
        self.told: set[tuple[str, int | None]] = set()

    @property
    def dataset(self) -> Dataset | None:
        """What is looked at."""
        datasets = (self.trainer.eval_dataset, self.trainer.train_dataset)
        return next((dataset for dataset in datasets if isinstance(dataset, Dataset) and len(dataset)), None)

    def on_step_end(self, args, state, control, **kwargs):
        every = math.ceil(state.max_steps * self.steps) if self.steps < 1 else int(self.steps)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            should_log = control.should_log
            self.examine(is_late=2 * state.global_step >= state.max_steps)
            control.should_log = should_log  # what is logged here is not what the trainer has to log

    def examine(self, is_late: bool = True):
        """Looks at the selection now; `is_late`: whether it has learnt enough to be warned of."""
        head = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model = head.base_model
        if self.dataset is None or not model.config.vision_config.schedule.layers:
            return
        rows = [self.dataset[row] for row in range(min(NUM_ROWS, len(self.dataset)))]
        was_training = head.training
        head.eval()
        with self.trainer.accelerator.autocast():
            metrics, findings = self._of_layers(model, rows)
            if not self.is_timed:
                self.is_timed = True
                timing, of_time = self._of_time(model)
                metrics |= timing
                self._warn(None, of_time)
        if is_late and (small := compare_with_twin(self.trainer, rows)):
            metrics |= {"small_accuracy": small.accuracy, "small_accuracy_unpruned": small.other_accuracy}
            self._warn(None, costs_detail(small))
        head.train(was_training)
        self.trainer.log({f"selection_{name}": value for name, value in metrics.items()})
        if is_late:
            for layer, of_layer in findings.items():
                self._warn(layer, of_layer)

    def _inputs(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        return a_text_per_image(self.trainer.data_collator(rows))

    def _of_layers(self, model: TripsModel, rows: list[dict]) -> tuple[dict[str, float], dict[int, list[Finding]]]:
        inputs = self._inputs(rows)
        metrics = measure_selection(model, inputs, rows, self.trainer.processing_class)
        side = self.trainer.processing_class.patch_size
        num_patches = math.prod(inputs["pixel_values"].shape[-2:]) // side**2
        texts_differ = _differ(rows, inputs["image_index"].tolist())
        findings = {}
        for layer, selection in model.config.vision_config.schedule.by_layer.items():
            prefix = f"layer{layer}_"
            own = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
            findings[layer] = list(LayerHealth(layer, selection.guidance, own, num_patches, texts_differ).findings())
        return metrics, findings

    def _of_time(self, model: TripsModel) -> tuple[dict[str, float], Iterator[Finding]]:
        rows = self._rows_of_a_batch()
        inputs = {name: tensor.to(model.device) for name, tensor in self._inputs(rows).items()}
        texts_per_image = len(inputs["image_index"]) / len(inputs["pixel_values"])
        time = time_ratio(model, inputs)
        macs = macs_ratio(model.config, inputs["input_ids"].shape[1], texts_per_image)
        metrics = {"time_ratio": time, "macs_ratio": macs}
        return metrics, costs_time(time, macs, texts_per_image)

    def _rows_of_a_batch(self) -> list[dict]:
        """As many as a batch of training has, with as many texts of an image as may stand in it together."""
        args, counts, rows = self.trainer.args, defaultdict(int), []
        for row in self.dataset:
            image = row.get("image_id") or tuple(row["image_ids"])
            counts[image] += 1
            if counts[image] <= args.texts_per_image:
                rows.append(row)
            if len(rows) == args.per_device_train_batch_size:
                break
        return rows

    def _warn(self, layer: int | None, findings: Iterable[Finding]):
        for finding in findings:
            if (finding.kind, layer) not in self.told:
                self.told.add((finding.kind, layer))
                if self.trainer.args.should_log:
                    logger.warning(finding.words)


def _differ(rows: list[dict], image_index: list[int]) -> bool:
    """Whether texts of an image are about different things, as far as the data tell."""
    regions = regions_of(rows)
    if not regions:
        return True
    by_image = defaultdict(set)
    for number, region in regions.items():
        by_image[image_index[number]].add(tuple(region))
    return any(len(different) > 1 for different in by_image.values())


def time_ratio(model: TripsModel, inputs: dict[str, torch.Tensor]) -> float:
    """Time of a forward pass, pruned / unpruned."""
    pruned, unpruned = seconds_of_both(model, inputs)
    return pruned / unpruned


def macs_ratio(config: TripsConfig, text_length: int, texts_per_image: float) -> float:
    """Counted multiply-accumulates of text encoder, vision tower and fusion encoder, pruned / unpruned."""
    pruned, unpruned = (forward_cost(config, text_length, schedule) for schedule in (None, UNPRUNED))
    return pruned.macs(texts_per_image) / unpruned.macs(texts_per_image)
