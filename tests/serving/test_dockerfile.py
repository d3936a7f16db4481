"""The image of the service: built by docker, or else by the same steps in an empty folder."""

import re
import shutil
import subprocess
import sys

import pytest
from clean_environment import make_environment
from places import ROOT
from programs import output_of
from running_service import CHECKPOINT, RunningService


pytestmark = pytest.mark.slow
DOCKER = shutil.which("docker")
DOCKERFILE = (ROOT / "serving/Dockerfile").read_text().replace("\\\n", " ")


def copy_source(folder):
    """Copy the tracked files that `COPY . /source` copies of a fresh clone."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    for name in output_of("git", "ls-files", *kept, cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


class InstalledService(RunningService):
    """Service of another interpreter, in an empty folder."""

    def __init__(self, python, folder, **settings):
        super().__init__(folder.with_name("log"), **settings)
        self.python = python
        self.folder = folder


@pytest.mark.skipif(DOCKER is None, reason="docker is not installed")
def test_docker_builds_the_image():
    command = [DOCKER, "build", "--file", "serving/Dockerfile", "--tag", "trips-service-test", "."]
    subprocess.run(command, cwd=ROOT, check=True)
    load = "from trips_serving.engine import Engine; from trips_serving.settings import Settings; "
    load += "Engine(Settings.from_environment())"
    options = [
        "--rm",
        "--read-only",
        "--tmpfs",
        "/tmp",
        "--volume",
        f"{CHECKPOINT}:/model:ro",
        "--env=TRIPS_MODEL=/model",
    ]
    subprocess.run([DOCKER, "run", *options, "trips-service-test", "python", "-c", load], check=True)


def test_the_steps_of_the_image_install_a_service_that_starts(tmp_path):
    """torch comes from the running environment, the project from the wheel that the step builds."""
    torch, install, *_ = re.findall(r"^RUN pip install (.*)$", DOCKERFILE, re.MULTILINE)
    assert torch.split()[-2:] == ["torch", "torchvision"]
    assert '"/source[serving]"' in install
    source = tmp_path / "source"
    copy_source(source)
    python = make_environment(tmp_path / "environment")
    pip = f"{sys.executable} -m pip --python {python} install"
    subprocess.run(f"{pip} {install}".replace("/source", str(source)), shell=True, check=True, cwd=tmp_path)
    assert not source.exists()
    (command,) = re.findall(r"^CMD \[(.*)\]$", DOCKERFILE, re.MULTILINE)
    assert re.findall(r'"(.*?)"', command)[:3] == ["python", "-m", "trips_serving"]
    folder = tmp_path / "empty"
    folder.mkdir()
    with InstalledService(python, folder, model=CHECKPOINT) as service:
        for path in ("docs", "docs.js", "page.js", "page.css", "openapi.json"):
            assert service.get(path).status_code == 200
