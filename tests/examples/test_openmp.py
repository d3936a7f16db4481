"""The wait policy of OpenMP's threads in the scripts."""

import os
import subprocess
import sys

import pytest
from places import EXAMPLES


# The help of index_images.py loads no torch.
PATHS = sorted(path for path in EXAMPLES.glob("*.py") if path.name not in ("__init__.py", "index_images.py"))
SCRIPTS = [*([str(path)] for path in PATHS), ["-m", "trips_examples.run_vqa"]]


def openmp_settings(*words: str, **environment: str) -> str:
    environment = {**os.environ, "OMP_DISPLAY_ENV": "VERBOSE", **environment}
    environment = {name: value for name, value in environment.items() if value}
    result = subprocess.run([sys.executable, *words, "--help"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "usage: " in result.stdout
    return result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda words: words[-1])
def test_threads_of_a_script_sleep_while_they_wait(script):
    settings = openmp_settings(*script, OMP_WAIT_POLICY="")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in settings and "GOMP_SPINCOUNT = '3000'" in settings


@pytest.mark.slow
def test_what_the_user_chose_stays():
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in openmp_settings(str(EXAMPLES / "run_vqa.py"), OMP_WAIT_POLICY="active")
