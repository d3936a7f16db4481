"""Distributions: a wheel that works without the repository, and a source distribution that builds the same wheel."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from clean_environment import make_environment
from places import EXAMPLES, ROOT
from toy_tasks import OPTIONS, write_task


pytestmark = pytest.mark.slow
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "demo", "outputs", "*.egg-info", "__pycache__")
USE = """
import sys
from pathlib import Path
from PIL import Image
import modeling_trips, trips_examples
from modeling_trips import TripsForQuestionAnswering, TripsProcessor, TripsVisualQuestionAnsweringPipeline

environment, checkpoint = sys.argv[1:]
for package in (modeling_trips, trips_examples):
    assert Path(package.__file__).is_relative_to(environment), package.__file__
model, processor = TripsForQuestionAnswering.from_pretrained(checkpoint), TripsProcessor.from_pretrained(checkpoint)
answerer = TripsVisualQuestionAnsweringPipeline(model=model, processor=processor)
print(answerer(Image.new("RGB", (64, 64), "red"), "what color is it?", answers=["red", "blue"]))
"""


def run(*command, **options) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def distributions(clean_python, tmp_path_factory) -> dict[str, Path]:
    """Build the source distribution, the wheel from it, and the wheel of the repository."""
    folder = tmp_path_factory.mktemp("distributions")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    build = (clean_python, "-I", "-m", "build", "--no-isolation", folder / "source", "--outdir")
    run(*build, folder / "both", cwd=folder)
    run(*build, folder / "direct", "--wheel", cwd=folder)
    (source,) = (folder / "both").glob("*.tar.gz")
    (wheel,), (direct,) = (folder / "both").glob("*.whl"), (folder / "direct").glob("*.whl")
    return {"source": source, "wheel": wheel, "direct": direct}


@pytest.fixture(scope="module")
def python(distributions, tmp_path_factory) -> Path:
    """Return the Python of an environment with the wheel and the installed dependencies."""
    python = make_environment(tmp_path_factory.mktemp("installed"))
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-index", f"{distributions['wheel']}[examples]"
    )
    return python


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sources(folder: Path, package: str) -> set[str]:
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {f"{package}/{path.as_posix()}" for path in paths if "__pycache__" not in path.parts}


def test_the_source_distribution_builds_the_same_wheel(distributions):
    assert contents(distributions["wheel"]) == contents(distributions["direct"])


def test_the_wheel_holds_the_packages_whole_and_nothing_else(distributions):
    files = {name for name in contents(distributions["wheel"]) if ".dist-info/" not in name}
    expected = sources(ROOT / "modeling_trips", "modeling_trips") | sources(EXAMPLES, "trips_examples")
    expected |= sources(ROOT / "serving", "trips_serving")
    assert files == expected - {"trips_examples/README.md"}
    assert {
        "modeling_trips/py.typed",
        "modeling_trips/publishing/model_card_template.md",
        "trips_examples/configs/zero3.json",
    } <= files


def test_the_source_distribution_holds_no_tests_and_no_docs(distributions):
    with tarfile.open(distributions["source"]) as archive:
        names = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    metadata = {"PKG-INFO", "setup.cfg", "trips_transformers.egg-info"}
    described = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}
    code = {"examples", "modeling_trips", "serving"}
    assert names == metadata | described | code


def test_the_wheel_alone_trains_and_answers(python, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    here = {"cwd": tmp_path, "env": environment}
    script = (python, "-I", "-m", "trips_examples.run_vqa")
    assert "--train_file" in run(*script, "--help", **here)
    options = [*write_task("vqa", tmp_path), *OPTIONS, "--max_steps=2", f"--output_dir={tmp_path / 'model'}"]
    run(*script, *options, **here)
    assert run(python, "-I", "-c", USE, python.parent.parent, tmp_path / "model", **here).startswith("[{'score'")
