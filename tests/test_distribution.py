"""Distributions: a wheel that works without the repository, and a source distribution that builds the same wheel."""

import shutil
import sys
import zipfile

import pytest
from clean_environment import make_environment
from places import EXAMPLES, ROOT
from programs import output_of
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
assert all(Path(one.__file__).is_relative_to(environment) for one in (modeling_trips, trips_examples))
model, processor = TripsForQuestionAnswering.from_pretrained(checkpoint), TripsProcessor.from_pretrained(checkpoint)
answerer = TripsVisualQuestionAnsweringPipeline(model=model, processor=processor)
print(answerer(Image.new("RGB", (64, 64), "red"), "what color is it?", answers=["red", "blue"]))
"""


@pytest.fixture(scope="module")
def wheel(clean_python, tmp_path_factory):
    """Build the source distribution, and the wheel from it."""
    folder = tmp_path_factory.mktemp("distributions")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    build = [clean_python, "-I", "-m", "build", "--no-isolation"]
    output_of(*build, folder / "source", "--outdir", folder / "built", cwd=folder)
    (path,) = (folder / "built").glob("*.whl")
    return path


def sources(folder, package):
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {f"{package}/{path.as_posix()}" for path in paths if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_packages_whole_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = sources(ROOT / "modeling_trips", "modeling_trips") | sources(EXAMPLES, "trips_examples")
    assert files == (expected | sources(ROOT / "serving", "trips_serving")) - {"trips_examples/README.md"}


def test_the_wheel_alone_trains_and_answers(wheel, tmp_path):
    python = make_environment(tmp_path / "installed")
    output_of(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", f"{wheel}[examples]")
    here = {"cwd": tmp_path, "variables": {"OMP_NUM_THREADS": "1"}}
    script = (python, "-I", "-m", "trips_examples.run_vqa")
    assert "--train_file" in output_of(*script, "--help", **here)
    options = [*write_task("vqa", tmp_path), *OPTIONS, "--max_steps=2", f"--output_dir={tmp_path / 'model'}"]
    output_of(*script, *options, **here)
    assert output_of(python, "-I", "-c", USE, python.parent.parent, tmp_path / "model", **here).startswith("[{'score'")
