"""The trainer that the scripts share."""

from collections import defaultdict

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from trips_examples.data.collators import ImageBatchCollator, ImageGroupedSampler
from trips_examples.data.rows import column_of
from trips_examples.training.guard import LossGuard
from trips_examples.training.health import SelectionHealth
from trips_examples.training.selection_teacher import SelectionTeacher


class SamplerCallback(TrainerCallback):
    """Tells the sampler the epoch. Accelerate does not in the epoch that several processes resume in the middle of."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))


def set_tower_learning_rates(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rates: list[float]):
    """Put the parameters of the vision tower and of the text encoder into groups with learning rates of their own."""
    for tower, learning_rate in zip(("vision_model", "text_model"), learning_rates):
        own = {parameter for name, parameter in model.named_parameters() if tower in name.split(".")}
        for group in list(optimizer.param_groups):
            parameters = [parameter for parameter in group["params"] if parameter in own]
            group["params"] = [parameter for parameter in group["params"] if parameter not in own]
            optimizer.add_param_group({**group, "params": parameters, "lr": learning_rate})


class ImageGroupedTrainer(Seq2SeqTrainer):
    """
    `Seq2SeqTrainer` that draws the texts about an image together, collates training and evaluation apart, stops at a
    loss that is NaN or infinite ([`LossGuard`]), and evaluates each row once, whether the model writes or not.
    Parameters that get no gradient are frozen, so that data parallel training need not look for them. The parts of the
    loss that a model tells (`logged_losses`) are logged beside it, and what [`SelectionHealth`] finds.

    Args:
        train_collator ([`ImageBatchCollator`]): makes the batches of training; `data_collator` those of evaluation.
        selection_teacher ([`SelectionTeacher`], *optional*): says in training where texts should look, whether or
            not their regions are known.
        args, kwargs: as in `Seq2SeqTrainer`.
    """

    logged_losses: tuple[str, ...] = ("selection_loss", "pointing_loss")

    def __init__(
        self,
        *args,
        train_collator: ImageBatchCollator,
        selection_teacher: SelectionTeacher | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.train_collator = train_collator
        self.selection_teacher = selection_teacher
        self.losses: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.train_sampler: ImageGroupedSampler | None = None
        for parameter in self.model.unused_parameters():
            parameter.requires_grad_(False)
        self.add_callback(SamplerCallback(self))
        in_pieces = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        makes_batches = isinstance(self.data_collator, ImageBatchCollator)  # of evaluation, which are looked at
        if self.args.health_steps > 0 and makes_batches and not in_pieces:
            self.add_callback(SelectionHealth(self, self.args.health_steps))
        self.loss_guard = LossGuard(self.accelerator, self.args.output_dir)

    def _get_train_sampler(self, train_dataset=None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if "image_id" in dataset.column_names:
            image_ids = column_of(dataset, "image_id")
        else:  # several images per row: grouped with the rows about the same ones
            image_ids = [tuple(ids) for ids in column_of(dataset, "image_ids")]
        self.train_sampler = ImageGroupedSampler(image_ids, self.args.texts_per_image, self.args.seed)
        return self.train_sampler

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.tower_learning_rate is not None:
            learning_rates = self.args.tower_learning_rate
            learning_rates = learning_rates * 2 if len(learning_rates) == 1 else learning_rates
            set_tower_learning_rates(optimizer, self.model if model is None else model, learning_rates)
        return optimizer

    def get_train_dataloader(self):
        evaluation_collator, self.data_collator = self.data_collator, self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = evaluation_collator

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        self.loss_guard.check()
        return output

    def _run_epoch(self, *args, **kwargs):
        # `Trainer` would take one step more after a checkpoint of the last step that lies within an epoch.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        sources = inputs.pop("sources", [])
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.loss_guard.watch(loss, self.state.global_step + 1, sources)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if model.training and self.selection_teacher is not None:
            inputs = {**inputs, "patch_targets": self.selection_teacher.patch_targets(inputs)}
            inputs.pop("regions", None)  # who asks for a teacher wants to be taught by it
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        for name in self.logged_losses:
            if outputs.get(name) is not None:
                self.losses[name].append(outputs[name].detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "loss" in logs:
            means = {name: torch.stack(values).mean() for name, values in self.losses.items()}
            logs = {**logs, **{name: self.accelerator.gather(mean).mean().item() for name, mean in means.items()}}
            self.losses.clear()
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        self.loss_guard.check()
        super()._save_checkpoint(model, trial)

    def evaluation_loop(self, *args, **kwargs):
        # `Seq2SeqTrainer` would keep the rows that fill up the last batch of several processes.
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        inputs.pop("sources", None)
        if self.model.can_generate():
            result = super().prediction_step(model, inputs, *args, **kwargs)
            self.model.generation_config.max_length = None  # it was set beside `max_new_tokens`, which warns
            return result
        return Trainer.prediction_step(self, model, inputs, *args, **kwargs)
