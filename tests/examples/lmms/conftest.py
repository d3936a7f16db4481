"""Installation of lmms-eval for tests."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


# lmms-eval requires about fifty packages, most of them for other models. It starts with these.
PACKAGES = """lmms-eval>=0.7.3 filelock<4 colorama loguru lxml portalocker sacrebleu tenacity pytablewriter
DataProperty chardet mbstrdecoder pathvalidate tabledata tcolorpy typepy""".split()


@pytest.fixture(scope="session")
def packages(tmp_path_factory) -> Path:
    """Return a folder with packages for these tests; lmms-eval patches internals of filelock below 4."""
    folder = tmp_path_factory.mktemp("packages")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
    subprocess.run(install, check=True)
    return folder


@pytest.fixture
def run_python(packages, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs Python in the environment of lmms-eval."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
        environment = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )

    return run
