"""The trainer of pre-training: momentum teacher, learning rates by part, streams, and checkpoints that hold it all."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_trips import MomentumTeacher
from trips_examples.data.rows import column_of
from trips_examples.data.streams import PairStream, Position
from trips_examples.metrics.pretraining import word_and_matching_metrics
from trips_examples.training.files import write_whole
from trips_examples.training.retrieval_trainer import RetrievalTrainer


MAX_QUEUE_SIZE = 65536  # ALBEF's
EPOCH_OF_A_STREAM = 1 / 30  # of all steps: ALBEF trains for 30 epochs


class TeacherCallback(TrainerCallback):
    """Updates the momentum teacher after each step of the optimizer. Until it takes part it is the model's copy."""

    def __init__(self, trainer: "PretrainingTrainer"):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        momentum = None if self.trainer.teacher_takes_part else 0.0
        self.trainer.teacher.update(self.trainer.accelerator.unwrap_model(model), momentum)


class PretrainingTrainer(RetrievalTrainer):
    """
    [`RetrievalTrainer`] for [`TripsForPreTraining`]. Checkpoints hold the teacher with its queues
    (`momentum.safetensors`), and of a stream where each process is (`stream_0.json`, ...), so that a resumed run ends
    with the weights of one that was left alone. The model that is saved at the end holds none of it.

    Args:
        args ([`PretrainingArguments`])
        train_dataset (`datasets.Dataset` or [`PairStream`])
    """

    logged_losses = ("itc_loss", "itm_loss", "selection_loss", "mlm_loss", "prefix_lm_loss")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.model.config
        self.teacher = None
        if self.args.momentum_teacher and (config.itc_weight > 0 or config.mlm_weight > 0):
            if is_deepspeed_zero3_enabled():
                raise ValueError(
                    "A momentum teacher averages whole weights, of which ZeRO-3 leaves each process a part: take "
                    "zero2.yaml, fsdp2.yaml or ddp.yaml, or --momentum_teacher False."
                )
            self.teacher = MomentumTeacher(self.model, self.args.momentum, self.queue_size)
            self.teacher.to(self.args.device)  # `Trainer` leaves a model that FSDP or DeepSpeed will wrap where it was
            self.add_callback(TeacherCallback(self))
        self.positions = [Position()] * max(1, self.args.dataloader_num_workers)
        self.num_batches = 0
        if self.is_stream:
            self.args.ignore_data_skip = True  # a stream knows where to go on

    @property
    def is_stream(self) -> bool:
        return isinstance(self.train_dataset, PairStream)

    @property
    def queue_size(self) -> int:
        """As in [`PretrainingArguments`], but at least the batch of all processes."""
        if self.args.queue_size is not None:
            return self.args.queue_size
        if self.train_dataset is None or self.is_stream:
            return MAX_QUEUE_SIZE
        batch = self.args.train_batch_size * self.args.world_size
        return min(MAX_QUEUE_SIZE, max(batch, len(self.train_dataset) // 10))

    # Data and optimizer

    def get_train_dataloader(self) -> DataLoader:
        if not self.is_stream:
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,  # each process has its own
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.train_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # or starting workers would draw from the one that training draws from
        )

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is not None or self.args.vision_learning_rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        vision = {id(parameter) for parameter in self.model.model.vision_model.parameters()}
        for group in list(optimizer.param_groups):
            parameters = [parameter for parameter in group["params"] if id(parameter) in vision]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in vision]
            optimizer.add_param_group({**group, "params": parameters, "lr": self.args.vision_learning_rate})
        return optimizer

    # Steps

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch, or of what counts as one in a stream."""
        if self.is_stream:
            return math.ceil(self.state.max_steps * EPOCH_OF_A_STREAM)
        batches = math.ceil(len(self.train_dataset) / (self.args.train_batch_size * self.args.world_size))
        return math.ceil(batches / self.args.gradient_accumulation_steps)

    @property
    def teacher_steps(self) -> int:
        """How many steps the teacher has taken part in; below 0, how many are left until it does."""
        start = self.args.teacher_start_steps
        return self.state.global_step - (self.epoch_steps if start is None else start)

    @property
    def teacher_takes_part(self) -> bool:
        return self.teacher is not None and self.teacher_steps >= 0

    def current_teacher_weight(self) -> float:
        if not self.teacher_takes_part:
            return 0.0
        ramp = self.epoch_steps if self.args.teacher_ramp_steps is None else self.args.teacher_ramp_steps
        return self.args.teacher_weight * (min(1.0, self.teacher_steps / ramp) if ramp > 0 else 1.0)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        position = inputs.pop("position", None)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if position is not None:
            worker, self.positions[worker] = position
            self.num_batches += 1
        return loss

    def compute_loss(self, model, inputs, **kwargs):
        if not self.teacher_takes_part:
            return super().compute_loss(model, inputs, **kwargs)
        with self.accelerator.autocast():
            inputs = self.teacher.teach(inputs, self.current_teacher_weight())
        loss = super().compute_loss(model, inputs, **kwargs)
        if model.training:
            self.teacher.push(inputs["teacher"])
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "loss" in logs and self.teacher is not None:
            logs = {**logs, "teacher_weight": self.current_teacher_weight()}
        if "loss" in logs and self.is_stream:  # of this process
            logs = {**logs, "pairs": sum(position.seen for position in self.positions)}
            logs = {**logs, "bad_pairs": sum(position.bad for position in self.positions)}
        super().log(logs, *args, **kwargs)

    # Checkpoints

    def _save_checkpoint(self, model, trial):
        """The trainer's state is written last: a checkpoint that has it is whole."""
        self.loss_guard.check()
        if not self.args.save_only_model:
            folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            if self.teacher is not None and self.args.should_save:
                self.teacher.save(folder)
            if self.is_stream:
                positions = [asdict(position) for position in self.positions]
                state = {"num_processes": self.args.world_size, "num_batches": self.num_batches}
                write_whole(self._stream_file(folder), json.dumps({**state, "positions": positions}))
            self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _stream_file(self, folder: Path) -> Path:
        return folder / f"stream_{self.args.process_index}.json"

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            if self.teacher is not None:
                self.teacher.load(folder)
            if self.is_stream:
                self._resume_stream(folder)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _resume_stream(self, folder: Path):
        path = self._stream_file(folder)
        state: dict = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"num_processes": "other"}
        if state["num_processes"] != self.args.world_size:
            raise ValueError(
                f"{folder} is of a run with {state['num_processes']} processes, and its stream cannot go on with "
                f"{self.args.world_size}: launch as many."
            )
        self.positions = [Position(**position) for position in state["positions"]]
        self.num_batches = state["num_batches"]
        self.train_dataset.resume(self.positions, self.num_batches)

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Retrieval by features, and what [`word_and_matching_metrics`] measures."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = {}
        if self.model.config.itc_weight > 0:
            metrics = {**self.search(dataset).metrics, "chance_r1": 1 / len(set(column_of(dataset, "image_id")))}
        metrics |= word_and_matching_metrics(self, dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return {**metrics, f"{metric_key_prefix}_samples": len(dataset)}
