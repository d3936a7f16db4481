"""The wait policy of OpenMP's threads in the scripts, which `trips_examples` sets before torch loads."""

import ast
import os
import subprocess
import sys

import pytest
from places import EXAMPLES


PATHS = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_each_script_imports_the_package_before_libraries_that_load_torch(path):
    imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    others = [name.partition(".")[0] for name in names]
    first = others.index("trips_examples")
    assert all(name in sys.stdlib_module_names for name in others[:first])


@pytest.mark.slow
@pytest.mark.parametrize(("given", "policy"), [("", "PASSIVE"), ("active", "ACTIVE")], ids=["default", "of the user"])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(given, policy):
    environment = {**os.environ, "OMP_DISPLAY_ENV": "VERBOSE", "OMP_WAIT_POLICY": given}
    environment = {name: value for name, value in environment.items() if value}
    command = [sys.executable, str(EXAMPLES / "run_vqa.py"), "--help_all"]  # loads torch
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"OMP_WAIT_POLICY = '{policy}'" in result.stderr
