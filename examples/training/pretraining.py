"""Pre-training: splits and streams of pairs, and the trainer with its momentum teacher."""

import copy
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_trips import TripsConfig, TripsProcessor
from trips_examples.data.images import column_of
from trips_examples.data.streams import PairStream, Shard, find_shards, hub_shards
from trips_examples.training.files import write_json
from trips_examples.training.momentum import MomentumTeacher
from trips_examples.training.options import PairArguments, PretrainingArguments
from trips_examples.training.retrieval import RetrievalTrainer
from trips_examples.training.runs import TripsTrainingArguments
from trips_examples.training.start import load_data
from trips_examples.training.trainer import CallbackOf


OBJECTIVES = ("itc_weight", "itm_weight", "mlm_weight", "prefix_lm_weight")
MAX_QUEUE_SIZE = 65536  # ALBEF's
TEACHER_WEIGHT = 0.4  # ALBEF's, reached after an epoch with the teacher
EPOCH_OF_A_STREAM = 1 / 30  # of all steps, as ALBEF trains for 30 epochs


def load_pairs(
    args: PairArguments, training_args: TripsTrainingArguments, config: TripsConfig, processor: TripsProcessor | None
) -> dict[str, Dataset | PairStream]:
    """
    Return the splits of pre-training, of which a stream may be the training split.

    Raises:
        ValueError: All objectives are off, or options of the stream exclude each other.
    """
    if all(getattr(config, name) == 0 for name in OBJECTIVES):
        raise ValueError(f"All objectives have weight 0. Give one of {', '.join(OBJECTIVES)} a weight.")
    patch_size = config.vision_config.patch_shape[0]
    if not args.is_stream:
        return load_data("captions", args, training_args, patch_size)
    if args.train_shards is not None and (args.train_file is not None or args.streaming):
        raise ValueError("--train_shards excludes --train_file and --streaming. Give one of them.")
    if args.streaming and args.dataset_name is None:
        raise ValueError("--streaming needs --dataset_name.")
    if training_args.do_train and training_args.max_steps <= 0:
        raise ValueError("A stream needs --max_steps.")
    if training_args.do_eval and args.validation_file is None:
        raise ValueError("A stream has no validation split. Give --validation_file or --do_eval False.")
    args.check_files()
    if args.train_shards is not None:
        shards: Sequence[Shard] = find_shards(args.train_shards, args.image_root)
    else:
        shards = hub_shards(args.dataset_name, args.dataset_config_name, args.train_split or "train")
    if processor is None:
        raise ValueError("A stream needs --tokenizer for a model from scratch.")
    skipped_share = 0.05 if args.skip_bad_rows else 0.0
    stream = PairStream(
        shards,
        seed=training_args.seed,
        buffer_size=args.shuffle_buffer,
        process_index=training_args.process_index,
        num_processes=training_args.world_size,
        image_column=args.own_columns.get("image"),
        caption_column=args.own_columns.get("caption"),
        processor=processor,
        max_bad_share=skipped_share if args.max_bad_share is None else args.max_bad_share,
        log_folder=training_args.output_dir,
    )
    if args.validation_file is None:
        return {"train": stream}
    without_training = copy.copy(training_args)
    without_training.do_train = False
    return {**load_data("captions", args.without_stream, without_training, patch_size), "train": stream}


def stream_positions(state: dict) -> list[dict[str, int]]:
    """Return the stream's position in each worker from the state of a `StatefulDataLoader`."""
    workers = state["_snapshot"]["_worker_snapshots"].values() if "_snapshot" in state else [state]
    return [worker["dataset_state"] for worker in workers]


class TeacherCallback(CallbackOf):
    """Update the momentum teacher after each optimizer step. Before its first step it is a copy of the model."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        momentum = None if self.trainer.teacher_takes_part else 0.0
        self.trainer.teacher.update(self.trainer.accelerator.unwrap_model(model), momentum)


class PretrainingTrainer(RetrievalTrainer):
    """
    [`RetrievalTrainer`] for [`TripsForPreTraining`]. Checkpoints include the teacher with its queues
    (`momentum.safetensors`) and, for streams, the state of each process's loader (`stream_0.json`, ...). A resumed run
    ends with the same weights as an uninterrupted one.
    """

    task_args: PretrainingArguments
    logged_losses = ("itc_loss", "itm_loss", "selection_loss", "mlm_loss", "prefix_lm_loss")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.model.config
        self.teacher = None
        if self.task_args.momentum_teacher and (config.itc_weight > 0 or config.mlm_weight > 0):
            if is_deepspeed_zero3_enabled():
                raise ValueError("ZeRO-3 does not support --momentum_teacher. Use zero2.yaml, fsdp2.yaml or ddp.yaml.")
            self.teacher = MomentumTeacher(self.model, queue_size=self.queue_size)
            self.teacher.to(self.args.device)  # `Trainer` does not move models for FSDP or DeepSpeed
            self.add_callback(TeacherCallback(self))
        self.stream_loader: DataLoader | None = None
        self.stream_state: dict | None = None
        if self.is_stream:
            self.args.ignore_data_skip = True  # the stream's loader restores its state

    @property
    def is_stream(self) -> bool:
        return isinstance(self.train_dataset, PairStream)

    @property
    def queue_size(self) -> int:
        """As in [`PretrainingArguments`], but at least the batch of all processes."""
        if self.task_args.queue_size is not None:
            return self.task_args.queue_size
        if self.train_dataset is None or self.is_stream:
            return MAX_QUEUE_SIZE
        batch = self.args.train_batch_size * self.args.world_size
        return min(MAX_QUEUE_SIZE, max(batch, len(self.train_dataset) // 10))

    # Data and optimizer

    def get_train_dataloader(self) -> DataLoader:
        if not self.is_stream:
            return super().get_train_dataloader()
        from torchdata.stateful_dataloader import StatefulDataLoader  # an extra

        self.stream_loader = StatefulDataLoader(
            self.train_dataset,  # each process has its own
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.train_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # starting workers must not draw from the training's generator
        )
        if self.stream_state is not None:
            self.stream_loader.load_state_dict(self.stream_state)
        return self.stream_loader

    # Steps

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch, or of `EPOCH_OF_A_STREAM`."""
        if self.is_stream:
            return math.ceil(self.state.max_steps * EPOCH_OF_A_STREAM)
        batches = math.ceil(len(self.train_dataset) / (self.args.train_batch_size * self.args.world_size))
        return math.ceil(batches / self.args.gradient_accumulation_steps)

    @property
    def teacher_steps(self) -> int:
        """Number of steps with the teacher; negative before its first step."""
        start = self.task_args.teacher_start_steps
        return self.state.global_step - (self.epoch_steps if start is None else start)

    @property
    def teacher_takes_part(self) -> bool:
        return self.teacher is not None and self.teacher_steps >= 0

    def current_teacher_weight(self) -> float:
        if not self.teacher_takes_part:
            return 0.0
        return TEACHER_WEIGHT * min(1.0, self.teacher_steps / self.epoch_steps)

    def compute_loss(self, model, inputs, **kwargs):
        if not self.teacher_takes_part:
            return super().compute_loss(model, inputs, **kwargs)
        with self.accelerator.autocast():
            inputs = self.teacher.teach(inputs, self.current_teacher_weight())
        loss = super().compute_loss(model, inputs, **kwargs)
        self.teacher.push(inputs["teacher"])
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs):
        logs = dict(logs)
        if "loss" in logs and self.teacher is not None:
            logs["teacher_weight"] = self.current_teacher_weight()
        if "loss" in logs and self.is_stream:  # of this process
            positions = stream_positions(self.stream_loader.state_dict())
            logs["pairs"] = sum(position["seen"] for position in positions)
            logs["bad_pairs"] = sum(position["bad"] for position in positions)
        super().log(logs, *args, **kwargs)

    # Checkpoints

    def _save_checkpoint(self, model, trial):
        """Save the teacher and the stream first, because a complete checkpoint has the trainer's state."""
        if not self.args.save_only_model:
            folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            if self.teacher is not None and self.args.should_save:
                self.teacher.save(folder)
            if self.is_stream:
                state = {**self._stream_readers, "loader": self.stream_loader.state_dict()}
                write_json(folder / f"stream_{self.args.process_index}.json", state)
            self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            if self.teacher is not None:
                self.teacher.load(folder)
            if self.is_stream:
                path = folder / f"stream_{self.args.process_index}.json"
                state = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
                readers = {name: state.get(name) for name in self._stream_readers}
                if readers != self._stream_readers:
                    raise ValueError(f"{folder} has a stream with {readers}, but this run has {self._stream_readers}.")
                self.stream_state = state["loader"]
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    @property
    def _stream_readers(self) -> dict[str, int]:
        return {"num_processes": self.args.world_size, "num_workers": self.args.dataloader_num_workers}

    # Evaluation

    def metrics_of(self, dataset: Dataset) -> dict[str, float]:
        """Return the metrics of retrieval by features and matching, and the means of the losses over batches."""
        metrics = {}
        if self.model.config.itc_weight > 0:
            metrics, _ = self.search(dataset)
            metrics["chance_r1"] = 1 / len(set(column_of(dataset, "image_id")))
        model = self.model_to_evaluate()
        losses = defaultdict(list)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)  # of the negatives, so that they do not depend on the training
            is_quiet = self.args.disable_tqdm or not self.args.should_log
            for batch in tqdm(self.get_eval_dataloader(dataset), desc="Losses", disable=is_quiet):
                batch.pop("sources")
                with self.accelerator.autocast():
                    outputs = model(**batch, schedule=self.schedule)
                for name in self.logged_losses:
                    if outputs.get(name) is not None:
                        losses[name].append(outputs[name])
        return {**metrics, **self.means_of(losses, self.logged_losses), "samples": len(dataset)}
