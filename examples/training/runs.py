"""The order of a run: options, data, training, evaluation, the end."""

import logging
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState
from datasets import DatasetDict
from transformers import Trainer, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trips_examples.data.faults import BadRows
from trips_examples.data.loading import load_task_dataset
from trips_examples.data.rows import without_decoding
from trips_examples.training.options import DataArguments, TripsTrainingArguments
from trips_examples.training.parser import make_parser


def parse_arguments(argv: list[str] | None, *classes: type, description: str) -> tuple[Any, ...]:
    """
    The options of a script, one object per class; `TripsTrainingArguments` or a subclass has to be the last class.
    Also sets up logging, where one process speaks for all, and the seed.
    """
    parser = make_parser(*classes, description=description)
    arguments = parser.parse_args_into_dataclasses(args=argv)
    training_args = arguments[-1]
    level = logging.INFO if training_args.should_log else logging.WARNING
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level)
    transformers.utils.logging.set_verbosity_warning()
    set_seed(training_args.seed)
    if training_args.do_train:
        checkpoint_to_resume(training_args)  # raises before any data are read
    return arguments


def load_data(task: str, args: DataArguments, training_args: TripsTrainingArguments, patch_size: int) -> DatasetDict:
    """
    The splits of a task (see `load_task_dataset`), as short as asked for, with images left encoded for the collators.

    Raises:
        ValueError: if there are bad rows, or no split to train or evaluate on as asked.
    """
    wanted = {"train": training_args.do_train, "validation": training_args.do_eval}
    if args.files:  # before they are read
        _check_splits(args.files, wanted)
    bad_rows = BadRows(skip=args.skip_bad_rows, patch_size=patch_size)
    data = load_task_dataset(task, args, bad_rows, seed=training_args.seed)
    _check_splits(data, wanted)
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    for split, limit in limits.items():
        if limit is not None and split in data:
            data[split] = data[split].select(range(min(limit, len(data[split]))))
    if "validation" in data and "image_id" in data["validation"].column_names:
        data["validation"] = data["validation"].sort("image_id")  # rows of one image share its computation
    return DatasetDict({split: without_decoding(dataset) for split, dataset in data.items()})


def _check_splits(splits: Container[str], wanted: dict[str, bool]):
    actions = {"train": "--do_train", "validation": "--do_eval"}
    for split, action in actions.items():
        if wanted[split] and split not in splits:
            raise ValueError(f"There is no {split} split: give --{split}_file, or turn {action} off ({action} False).")


def checkpoint_to_resume(args: TripsTrainingArguments) -> str | None:
    """
    The folder that `--resume_from_checkpoint` means: a path, or `last` for the latest in `output_dir` that is whole,
    since a run may have been killed while it wrote one. The trainer's state is what is written last.

    Raises:
        ValueError: `last`, and there is none; or nothing to resume is given, and there are checkpoints, which would be
            taken for those of the new run.
    """
    folders = [path.parent for path in Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    if args.resume_from_checkpoint is None and folders:
        raise ValueError(
            f"{args.output_dir} holds checkpoints: go on from them with --resume_from_checkpoint last, or choose "
            "another --output_dir."
        )
    if args.resume_from_checkpoint != "last":
        return args.resume_from_checkpoint
    if not folders:
        raise ValueError(f"--resume_from_checkpoint last: there is no checkpoint in {args.output_dir}.")
    return str(max(folders, key=lambda folder: int(folder.name.rpartition("-")[2])))


def train_and_evaluate(trainer: Trainer, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    """
    What a script does with its trainer: train (or resume), save, evaluate, as `do_train` and `do_eval` say. Metrics
    are printed, and written to `train_results.json`, `eval_results.json` and `all_results.json`.

    Args:
        trainer (`Trainer`)
        evaluate (`Callable[[], dict[str, float]]`): called in every process; returns the metrics of the evaluation.

    Returns:
        `dict[str, float]`: the metrics of both.
    """
    metrics = {}
    if trainer.args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.args))
        trainer.save_model()
        trainer.save_state()
        _report(trainer, "train", result.metrics)
        metrics |= result.metrics
    if trainer.args.do_eval:
        evaluation = evaluate()
        _report(trainer, "eval", evaluation)
        metrics |= evaluation
    return metrics


def _report(trainer: Trainer, split: str, metrics: dict[str, float]):
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def end_processes():
    """The last words of a script: processes wait for each other and part. Gloo can abort one that just exits."""
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
