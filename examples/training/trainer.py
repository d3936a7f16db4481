"""Trainers of the scripts."""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from modeling_trips import SelectionSchedule
from trips_examples.data.collators import ImageBatchCollator, ImageGroupedSampler
from trips_examples.data.images import image_keys, regions_of
from trips_examples.training.phases import Phases, options_of_phases


logger = logging.getLogger(__name__)

REMEDY = (
    "Resume from a checkpoint (--resume_from_checkpoint last), and if the rows are fine with a lower --learning_rate, "
    "a longer --warmup_steps or in float32."
)


class CallbackOf(TrainerCallback):
    """Callback that knows its trainer."""

    def __init__(self, trainer: "ImageGroupedTrainer"):
        self.trainer = trainer


class PhasesCallback(CallbackOf):
    """
    Log the phases of a training, train the late layers from where scores learn relevance, and forget the best
    checkpoint of the unpruned steps where pruning begins.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        logger.info(
            "Training of %d steps: %s; regions used for: %s",
            state.max_steps,
            trainer.phases,
            trainer.regions_used_for,
        )
        trainer.model.config.vision_config.trained_keep_rates = trainer.phases.trained_keep_rates
        # `check_resumed` reads it from checkpoints.
        state.log_history.append({**options_of_phases(args), "step": state.global_step})

    def on_step_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        # A short run may have no step with relevance: then they are trained from the first pruned step on.
        first_step = trainer.phases.first_relevance_step or trainer.phases.unpruned_steps + 1
        for layer in trainer.late_layers:
            layer.requires_grad_(state.global_step + 1 >= first_step)
        if 0 < state.global_step == trainer.phases.unpruned_steps:
            state.best_metric = None
            state.best_global_step = None
            state.best_model_checkpoint = None


class SamplerEpochCallback(CallbackOf):
    """Set the epoch of the sampler. Accelerate skips that if several processes resume within an epoch."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))


class ZeroGradientCallback(CallbackOf):
    """
    Give what only the selection uses a gradient of zero in unpruned steps. FSDP resumes no parameter without an
    optimizer state: there, do so for all that never had a gradient, such as late layers. These stay as they are in one
    process: they neither decay nor count steps.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.untrained = {}  # parameters with their values
        if not self.trainer.step_schedule.layers:
            for name, parameter in model.named_parameters():
                if "selection_projection" in name and parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        if self.trainer.is_fsdp_enabled:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    num_steps = optimizer.state.get(parameter, {}).get("step", 0)
                    if parameter.grad is None and num_steps == 0:
                        parameter.grad = torch.zeros_like(parameter)
                        self.untrained[parameter] = parameter.detach().clone()

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for parameter, value in self.untrained.items():
            parameter.copy_(value)
            optimizer.state[parameter]["step"].zero_()


class FiniteCallback(TrainerCallback):
    """Raise a `FloatingPointError` at the first gradient or metric of an evaluation that is not finite."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if args.fp16 or not gradients:  # the scaler of fp16 skips such steps, DeepSpeed has its own gradients
            return
        norm = nn.utils.get_total_norm(gradients)
        if hasattr(norm, "full_tensor"):  # FSDP2
            norm = norm.full_tensor()
        if not norm.isfinite():
            raise FloatingPointError(f"The gradient norm of step {state.global_step + 1} is {norm:g}. {REMEDY}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        broken = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
        if broken:
            step = state.global_step
            raise FloatingPointError(f"The evaluation after step {step} is not finite in {', '.join(broken)}.")


class FiniteTrainer(Trainer):
    """
    `Trainer` whose processes all stop at the first loss, gradient or metric that is not finite, and that trains no
    step more when it resumes from the last one. `data` has the splits `"train"`, `"validation"` and `"test"`, or some
    of them. Batches may name their rows as `sources`.
    """

    def __init__(self, *args, data: Mapping[str, Any], **kwargs):
        super().__init__(
            *args,
            train_dataset=data.get("train"),
            eval_dataset=data.get("validation"),
            **kwargs,
        )
        self.test_dataset = data.get("test")
        self.add_callback(FiniteCallback())

    @property
    def split(self) -> str:
        """The split that is evaluated: validation, or test at the end of a run."""
        return "validation" if self.eval_dataset is not self.test_dataset else "test"

    def _run_epoch(self, *args, **kwargs):
        # `Trainer` runs one extra step after resuming from the last step within an epoch, and has no hook for it.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        sources = inputs.pop("sources", [])
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.accelerator.gather(loss.detach().reshape(1)).isfinite().all():
            rows = f" for the rows {', '.join(sources)}" if sources else ""
            own = [] if loss.isfinite() else [f"{loss.item()}{rows}"]
            step = self.state.global_step + 1
            raise FloatingPointError(f"The loss of step {step} is {'; '.join(gather_object(own))}. {REMEDY}")
        return loss


class ImageGroupedTrainer(FiniteTrainer, Seq2SeqTrainer):
    """
    `Seq2SeqTrainer` that samples the texts of an image together, may have a collator of its own for training
    (`train_collator`), logs the parts of the loss (`logged_losses`), and evaluates each row once.
    """

    logged_losses: tuple[str, ...] = ("selection_loss", "attention_loss")

    def __init__(self, *args, train_collator: ImageBatchCollator | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.train_collator = train_collator or self.data_collator
        self.losses: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.train_sampler: ImageGroupedSampler | None = None
        self.late_layers = self._take_late_layers()
        self.add_callback(PhasesCallback(self))
        self.add_callback(SamplerEpochCallback(self))
        self.add_callback(ZeroGradientCallback(self))

    def _take_late_layers(self) -> list[nn.Module]:
        """
        Return the frozen layers whose scores will learn relevance. They are trained from then on, so the
        optimizer takes them, too.
        """
        late_layers = []
        if self.args.relevance_share > 0 or self.args.learns_relevance:
            for number in self.model.config.vision_config.schedule.scoring().layers:
                layer = self.model.base_model.vision_model.layers[number - 1]
                if not any(parameter.requires_grad for parameter in layer.parameters()):
                    layer.requires_grad_(True)
                    late_layers.append(layer)
        return late_layers

    @property
    def phases(self) -> Phases:
        """The phases of the training."""
        return Phases(
            schedule=self.model.config.vision_config.schedule,
            max_steps=self.state.max_steps,
            seed=self.args.seed,
            **options_of_phases(self.args),
        )

    @property
    def schedule(self) -> SelectionSchedule:
        """The schedule of an evaluation: during a training, that of the phase it is in."""
        return self.phases.evaluated_after(self.state.global_step) if self.is_in_train else self.phases.schedule

    @property
    def step_schedule(self) -> SelectionSchedule:
        """The schedule of this step of a training."""
        return self.phases.schedule_of(self.state.global_step + 1)

    @property
    def regions_used_for(self) -> str:
        """The losses that regions of the training data teach: "selection loss", "attention loss", both, or "none"."""
        config = self.model.config
        losses = []
        if isinstance(self.train_dataset, Dataset) and any(regions_of(self.train_dataset)):
            if config.selection_loss_weight > 0 and config.vision_config.schedule.layers:
                losses.append("selection loss")
            if config.attention_loss_weight > 0 and hasattr(self.model, "box_head"):
                losses.append("attention loss")
        return ", ".join(losses) or "none"

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        args = self.args
        # It decays behind the unpruned steps, and there in an unpruned baseline.
        if args.lr_scheduler_type == "warmup_stable_decay":
            num_unpruned_steps = round(args.unpruned_share * num_training_steps)
            num_warmup_steps = args.get_warmup_steps(num_training_steps)
            num_decay_steps = num_training_steps - max(num_unpruned_steps, num_warmup_steps)
            given = args.lr_scheduler_kwargs or {}
            args.lr_scheduler_kwargs = {"num_decay_steps": num_decay_steps, **given}
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset=None) -> Sampler[int]:
        if train_dataset is None:
            train_dataset = self.train_dataset
        self.train_sampler = ImageGroupedSampler(
            image_keys(train_dataset), group_size=self.args.texts_per_image, seed=self.args.seed
        )
        return self.train_sampler

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not is_new or self.args.tower_learning_rate is None:
            return optimizer
        vision_rate = self.args.tower_learning_rate[0]
        text_rate = self.args.tower_learning_rate[-1]
        rates = {None: self.args.learning_rate, "vision_model": vision_rate, "text_model": text_rate}
        tower_of = {}
        for name, parameter in (model or self.model).named_parameters():
            tower_of[parameter] = next((part for part in name.split(".") if part in rates), None)
        groups = []
        for tower, rate in rates.items():
            for group in optimizer.param_groups:
                own = [parameter for parameter in group["params"] if tower_of[parameter] == tower]
                if own:  # FSDP resumes no empty group
                    groups.append({**group, "params": own, "lr": rate})
        optimizer.param_groups[:] = groups
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        # The learning rates of a resumed run are those of its own command line.
        own_rates = [group.get("initial_lr") for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.is_deepspeed_enabled or None in own_rates:  # as of a rate that follows a metric
            return
        groups = self.optimizer.param_groups
        for group, rate in zip(groups, own_rates):
            if group["initial_lr"] > 0:
                group["lr"] *= rate / group["initial_lr"]
            group["initial_lr"] = rate
        state = self.lr_scheduler.state_dict()
        self.lr_scheduler.load_state_dict(
            {**state, "base_lrs": own_rates, "_last_lr": [group["lr"] for group in groups]}
        )

    def get_train_dataloader(self):
        evaluation_collator = self.data_collator
        self.data_collator = self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = evaluation_collator

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        return super().training_step(model, {**inputs, "schedule": self.step_schedule}, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        num_parts = 1  # of the step, whose number of items the model divides its losses by
        if model.training and self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None:
            num_parts = self.current_gradient_accumulation_steps * self.args.world_size
        for name in self.logged_losses:
            if outputs.get(name) is not None:
                self.losses[name].append(num_parts * outputs[name].detach())
        self.losses["relevance_loss"] += outputs.get("relevance_values") or ()  # the backward pass fills them in
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "loss" in logs:
            logs = {**logs, **self.means_of(self.losses, (*self.logged_losses, "relevance_loss"))}
            self.losses.clear()
        super().log(logs, *args, **kwargs)

    def means_of(self, losses: dict[str, list[torch.Tensor]], names: Sequence[str]) -> dict[str, float]:
        """Return the mean of each loss over the batches of all processes that have it."""
        means = {}
        for name in names:  # equal in all processes, of which some may have no such batch
            values = [value.mean().float() for value in losses[name]]
            own = torch.tensor([sum(values), len(values)], dtype=torch.float32, device=self.args.device)
            total, count = self.accelerator.gather(own).view(-1, 2).sum(0).tolist()
            if count:
                means[name] = total / count
        return means

    def evaluation_loop(self, *args, **kwargs):
        # `Seq2SeqTrainer` keeps the rows that pad the last batch of several processes.
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        inputs.pop("sources", None)
        inputs["schedule"] = self.schedule
        if self.model.can_generate():
            result = super().prediction_step(model, inputs, *args, **kwargs)
            self.model.generation_config.max_length = None  # avoids a warning about `max_new_tokens`
            return result
        return Trainer.prediction_step(self, model, inputs, *args, **kwargs)
