"""Provenance fields that benchmarks and training scripts store with their results."""

import functools
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers


ROOT = Path(__file__).resolve().parents[2]


def provenance(device: str = "cpu", seed: int | None = None) -> dict[str, str | int | None]:
    """
    Return the command, versions and machine of a measurement.

    Args:
        device (`str`, *optional*, defaults to `"cpu"`): Device that was measured.
        seed (`int`, *optional*): Seed of the run.

    Returns:
        `dict`: Among others `git_commit` (`None` outside a checkout of this project; ends with `-dirty` if tracked
        files differ from the commit), `date` (UTC) and `cpu_capability` (the instructions that PyTorch uses, like
        `"AVX2"`).
    """
    is_cuda = torch.device(device).type == "cuda"
    return {
        "command": _command(),
        "git_commit": _git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "device_name": torch.cuda.get_device_name() if is_cuda else _cpu_name(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "python_version": platform.python_version(),
        "torch_version": torch.__version__.split("+")[0],
        "transformers_version": transformers.__version__,
    }


def _command() -> str:
    """Return the command line without the Hub's token, with paths of the project's scripts relative to the project."""
    script, *options = sys.argv
    path = Path(script).resolve()
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    line = shlex.join([name, *options])
    return re.sub(r"(--hub.token[ =])\S+", r"\1...", line)


def _cpu_name() -> str:
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("cpu_name") or platform.processor() or platform.machine()


@functools.cache
def _git_commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    if not (ROOT / ".git").exists():  # installed, maybe in another repository
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
