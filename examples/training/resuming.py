"""Resuming a run: from a whole checkpoint, as the run began."""

import json
import logging
import math
import zipfile
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from modeling_trips import TripsConfig, TripsProcessor
from trips_examples.training.checks import check_output, checkpoints_in
from trips_examples.training.phases import options_of_phases


logger = logging.getLogger(__name__)


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """
    Return the folder of `--resume_from_checkpoint`: a path, or `last` for the latest complete checkpoint in
    `output_dir`. A killed run or a full disk can leave an incomplete one, which a path must not name.

    Raises:
        ValueError: The checkpoint, or every one, is incomplete.
        OSError: As `check_output`.
    """
    wanted = args.resume_from_checkpoint
    check_output(args.output_dir, wanted, args.overwrite_output_dir)
    if wanted is None:
        return None
    if wanted != "last":
        if flaw := flaw_of(Path(wanted), args):
            raise ValueError(f"--resume_from_checkpoint {wanted}: {flaw}. Resume from another checkpoint.")
        return wanted
    for folder in checkpoints_in(args.output_dir):
        flaw = flaw_of(folder, args)
        if flaw is None:
            return str(folder)
        if args.should_log:
            logger.warning("Skipped the incomplete checkpoint %s: %s.", folder, flaw)
    raise ValueError(f"--resume_from_checkpoint last: {args.output_dir} has no complete checkpoint.")


def flaw_of(checkpoint: Path, args: TrainingArguments) -> str | None:
    """
    Return the defect of a checkpoint, or None if it is complete: a file that is missing, empty or truncated. The state
    of the trainer, which is written last, those of optimizer and learning rate, and the random state of each process
    of this run must be there.
    """
    states = [TRAINER_STATE_NAME]
    if not args.save_only_model:
        ranks = [f"_{rank}" for rank in range(args.world_size)] if args.world_size > 1 else [""]
        states += [f"rng_state{rank}.pth" for rank in ranks]
        if not any(checkpoint.glob("global_step*")):  # DeepSpeed's folder has both
            states.append("scheduler.pt")
            if not any(checkpoint.glob("optimizer*")):  # FSDP's are optimizer.bin or the folder optimizer_0
                states.append("optimizer.pt")
    for name in states:
        if not (checkpoint / name).exists():
            return f"{name} is missing (this run has {args.world_size} processes)"
    for path in sorted(checkpoint.iterdir()):
        try:
            _read_ends(path)
        except Exception as error:  # depends on the format
            return f"{path.name} is empty or truncated ({type(error).__name__})"
    return None


def _read_ends(path: Path):
    """Raise an exception if a file is truncated."""
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            pass
    elif path.suffix in (".pt", ".pth"):
        zipfile.ZipFile(path).close()


def check_resumed(config: TripsConfig, processor: TripsProcessor, args: TrainingArguments):
    """
    Compare the selection, the image size and the length of a resumed run with those of its checkpoint. Other values
    that the command line gives are a warning; other defaults, as of another version, are a `ValueError`.
    """
    folder = Path(args.resume_from_checkpoint)
    state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    values: dict[str, tuple[Any, Any]] = {}  # of the checkpoint and of this run
    if (folder / "config.json").exists():  # FSDP writes none
        stored = TripsConfig.from_pretrained(folder)
        values["schedule"] = (str(stored.vision_config.schedule), str(config.vision_config.schedule))
        values["selection_loss_weight"] = (stored.selection_loss_weight, config.selection_loss_weight)
        values["learns_relevance"] = (stored.learns_relevance, config.learns_relevance)
        images = TripsProcessor.from_pretrained(folder).image_processor
        values["image_size"] = (images.size["height"], processor.image_processor.size["height"])
    for entry in state.log_history:
        if "unpruned_share" in entry:  # by `PhasesCallback`; the last one counts
            for name, value in options_of_phases(args).items():
                if name in entry:
                    values[name] = (entry[name], value)
    has_same_epochs = args.max_steps <= 0 and state.num_train_epochs == math.ceil(args.num_train_epochs)
    if not has_same_epochs:
        values["max_steps"] = (state.max_steps, args.max_steps)
    same = {"num_train_epochs": "max_steps", "max_image_size": "image_size"}
    typed = args.typed | {value for name, value in same.items() if name in args.typed}
    changed = [name for name, (before, now) in values.items() if before != now]
    before = " ".join(f"--{name} {values[name][0]}" for name in changed)
    now = " ".join(f"--{name} {values[name][1]}" for name in changed)
    message = f"{folder} was trained with {before}, and this run has {now}."
    if not typed.issuperset(changed):
        raise ValueError(f"{message} Give {before} to go on as it began, or the values that you want.")
    if changed and args.should_log:
        logger.warning(message)
