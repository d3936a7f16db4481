"""The wait policy of OpenMP's threads in the scripts, which `trips_examples` sets before torch loads."""

import os
import subprocess
import sys

import pytest
from places import EXAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("given, policy", [("", "PASSIVE"), ("active", "ACTIVE")], ids=["default", "of the user"])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(given, policy):
    environment = {**os.environ, "OMP_DISPLAY_ENV": "VERBOSE", "OMP_WAIT_POLICY": given}
    environment = {name: value for name, value in environment.items() if value}
    command = [sys.executable, str(EXAMPLES / "run_vqa.py"), "--help_all"]  # loads torch
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"OMP_WAIT_POLICY = '{policy}'" in result.stderr
