"""Steps of a run: options, checkpoints, training and evaluation."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from transformers import Seq2SeqTrainingArguments, TrainingArguments, set_seed

from trips_examples.data.source import option
from trips_examples.training.options import Parser, RunOptions, TrainingOptions, make_parser
from trips_examples.training.pictures import plot_training
from trips_examples.training.results import facts_of, print_summary, save_results
from trips_examples.training.resuming import checkpoint_to_resume
from trips_examples.training.trainer import FiniteTrainer


logger = logging.getLogger(__name__)

_locks: dict[Path, FileLock] = {}  # held by this process, by output folder


@dataclass
class RunArguments(RunOptions, TrainingArguments):
    """`TrainingArguments` with the defaults of [`RunOptions`]. `hub_token` is not written to checkpoints."""

    remove_unused_columns: bool = option(False, "The collators need all columns.")
    logging_nan_inf_filter: bool = option(False, "Not used: a loss that is not finite stops the run.")
    typed: set[str] = field(default_factory=set, init=False)  # the options of the command line by name

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and computes_in_bf16(self.use_cpu)
        super().__post_init__()
        TrainingArguments.__post_init__(self)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "hub_token": None}

    @property
    def n_gpu(self) -> int:
        """At most 1 per process, because `nn.DataParallel` separates images from texts. Use `accelerate launch`."""
        return min(super().n_gpu, 1)

    @property
    def precision(self) -> str:
        return "bfloat16 mixed" if self.bf16 else "float16 mixed" if self.fp16 else "float32"


@dataclass
class TripsTrainingArguments(TrainingOptions, RunArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the defaults of [`TrainingOptions`]."""

    predict_with_generate: bool = option(True, "Evaluate generated texts.")

    def __post_init__(self):
        if self.label_smoothing_factor != 0.0:
            raise ValueError("--label_smoothing_factor is not supported. Leave it at 0.")
        if not self.predict_with_generate:
            raise ValueError("--predict_with_generate False is not supported. Leave it on.")
        if self.eval_steps is None and self.logging_steps < 1:
            self.eval_steps = self.save_steps  # evaluations are slower than logging
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True  # no text scores in an unpruned step, for one
        super().__post_init__()


def computes_in_bf16(on_cpu: bool) -> bool:
    """Return whether the processor, or else the accelerator, has instructions for products in bfloat16."""
    if on_cpu:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for warnings of a resumed `Trainer` about tied weights and about steps that are given as shares."""
    message = record.getMessage()
    if "missing keys in the checkpoint" in message:
        return not all(name.endswith("decoder.weight") for name in re.findall(r"'([^']+)'", message))
    if "arguments do not match" in message:
        return "save_steps" in message or "batch_size" in message
    return True


def parse_arguments(parser: Parser, argv: list[str] | None = None) -> tuple[Any, ...]:
    """
    Parse the options of a training script, with Transformers' own: one object per class of the parser, in the place of
    [`RunOptions`] or [`TrainingOptions`] a [`RunArguments`] or [`TripsTrainingArguments`], which must be the last. Set
    up logging and the seed. A training run locks its output folder until `train_and_evaluate` or the process ends, and
    finds the checkpoint to resume from. A `BlockingIOError` is raised if another process trains in the folder.
    """
    full: dict[type, type] = {RunOptions: RunArguments, TrainingOptions: TripsTrainingArguments}
    classes = [full.get(each, each) for each in parser.classes]
    whole = make_parser(
        *classes,
        description=parser.description,
        task=parser.task,
        on_cpu=not torch.accelerator.is_available(),
        **parser.defaults,
    )
    arguments = whole.parse_args_into_dataclasses(args=argv)
    training_args = arguments[-1]
    training_args.typed = whole.typed
    level = logging.INFO if training_args.should_log else logging.WARNING
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level)
    logger.info("Output folder: %s", training_args.output_dir)
    transformers.utils.logging.set_verbosity_warning()
    for name in ("transformers.trainer", "transformers.trainer_utils"):
        logging.getLogger(name).addFilter(_is_news)
    set_seed(training_args.seed)
    if training_args.do_train:  # before data are read
        if training_args.process_index == 0:
            _lock_output(training_args.output_dir)
        training_args.resume_from_checkpoint = checkpoint_to_resume(training_args)
    return arguments


def _lock_output(output_dir: str):
    folder = Path(output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = _locks.setdefault(folder, FileLock(folder / ".training.lock", thread_local=False))
    try:
        lock.acquire(timeout=5)  # workers of a killed run may still hold it
    except Timeout as error:
        raise BlockingIOError(f"Another process trains in {output_dir}. Choose another --output_dir.") from error


def train_and_evaluate(trainer: FiniteTrainer) -> dict[str, float]:
    """
    Train (or resume), save, evaluate and test, as set by `do_train`, `do_eval` and `do_predict`. Metrics are written
    with their provenance to `train_results.json`, `eval_results.json`, `test_results.json` and `all_results.json`, and
    summed up in the last lines. `training.png` draws loss and metric over steps. Other files of the test go to the
    folder `test`. At the end, the output folder is unlocked.

    Returns:
        `dict[str, float]`: Metrics of the training, of the validation split (`eval_...`) and of the test split
        (`test_...`).
    """
    args = trainer.args
    metrics: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    try:
        if args.do_train:
            result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
            facts = facts_of(trainer)
            if trainer.is_world_process_zero():
                remove_earlier(args.output_dir)
            trainer.save_model()
            trainer.save_state()
            save_results(trainer, "train", result.metrics, facts)
            metrics |= result.metrics
        if args.do_eval:
            evaluation = trainer.evaluate()
            save_results(trainer, "eval", evaluation, facts)
            metrics |= evaluation
        if args.do_train and trainer.is_world_process_zero():
            plot_training(
                trainer.state.log_history,
                Path(args.output_dir, "training.png"),
                unpruned_steps=facts.get("unpruned_steps", 0),
                majority=metrics.get("eval_accuracy_majority"),
            )
        if args.do_predict and trainer.test_dataset is not None:
            with _on_test_split(trainer):
                evaluation = trainer.evaluate(metric_key_prefix="test")
            save_results(trainer, "test", evaluation, facts)
            metrics |= evaluation
        if args.should_log:
            print_summary(trainer, metrics)
    finally:
        if lock := _locks.pop(Path(args.output_dir).resolve(), None):
            lock.release(force=True)
    return metrics


def remove_earlier(folder: str):
    """
    Remove the weights and the results of another run. On a full disk its weights would stay beside the new
    configuration, and load; its results would stay if this run does not evaluate.
    """
    for pattern in ("*.safetensors*", "*_results.json", "predictions.jsonl", "test/predictions.jsonl"):
        for path in Path(folder).glob(pattern):
            path.unlink()


@contextmanager
def _on_test_split(trainer: FiniteTrainer) -> Iterator[None]:
    """Switch the trainer's evaluation to the test split and the folder `test` inside the context."""
    eval_dataset = trainer.eval_dataset
    output_dir = trainer.args.output_dir
    test_folder = Path(output_dir) / "test"
    test_folder.mkdir(exist_ok=True)
    trainer.eval_dataset = trainer.test_dataset
    trainer.args.output_dir = str(test_folder)
    trainer._eval_dataloaders = {}  # persistent workers have the validation split
    try:
        yield
    finally:
        trainer.eval_dataset = eval_dataset
        trainer.args.output_dir = output_dir
