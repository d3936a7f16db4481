"""Supported releases of Transformers: one range everywhere, and the lowest release trains, answers and patches."""

import os
import subprocess
import tomllib

import pytest
import transformers
import yaml
from clean_environment import make_environment
from json_files import read_json
from packaging.requirements import Requirement
from packaging.version import Version
from places import EXAMPLES, HELPERS, ROOT
from programs import output_of
from toy_tasks import OPTIONS, write_task

from modeling_trips.configuration_trips import TRANSFORMERS


RANGE = Requirement(TRANSFORMERS).specifier
LOWEST = min(Version(bound.version) for bound in RANGE)
LOAD = """
import sys, transformers
transformers.AutoModelForVisualQuestionAnswering.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
SMOKE = """
import json, sys
from pathlib import Path

import torch, transformers
from PIL import Image

examples, helpers, folder, *options = sys.argv[1:]
sys.path.append(helpers)
from modeling_trips import TripsForQuestionAnswering, TripsProcessor
from modeling_trips.hosts import apply_patch_selection, record_patch_selection
from tiny_vlms import VLMS, make_inputs
from trips_examples import run_vqa

model = TripsForQuestionAnswering.from_pretrained(f"{examples}/trips-tiny-scenes")
processor = TripsProcessor.from_pretrained(f"{examples}/trips-tiny-scenes")
inputs = processor(images=Image.open(f"{examples}/scene.png"), text="what color is the cross?", return_tensors="pt")
answers = processor.post_process_answers(model.generate(**inputs))

run_vqa.main(options)

host = VLMS[0].make()
apply_patch_selection(host, visual_tokens=2)
with record_patch_selection(host) as kept:
    host.generate(**make_inputs(VLMS[0]), max_new_tokens=2, do_sample=False)
Path(folder, "said.json").write_text(json.dumps(
    {"release": transformers.__version__, "answers": answers, "layers": len(kept)}
))
"""


def test_package_and_pages_name_one_range():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    assert TRANSFORMERS in dependencies and TRANSFORMERS in (ROOT / "docs/use.md").read_text("utf-8")
    assert Version(transformers.__version__) in RANGE
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text("utf-8"))["jobs"]
    assert f"{LOWEST}.0" in jobs["transformers"]["strategy"]["matrix"]["release"]


@pytest.mark.release
def test_an_unsupported_release_is_named_before_anything_fails(checkpoints, tmp_path):
    python = make_environment(ROOT / "build" / "transformers-4.57.6", ["transformers==4.57.6"])
    environment = {**os.environ, "HF_HOME": str(tmp_path)}  # a fresh cache of remote code
    command = [python, "-I", "-c", LOAD, checkpoints["TripsForQuestionAnswering"]]
    said = subprocess.run(command, env=environment, capture_output=True, text=True).stderr
    assert "\nImportError: " in said and "4.57.6" in said and TRANSFORMERS in said


@pytest.mark.slow
def test_the_lowest_release_trains_answers_and_patches(tmp_path):
    packages = [f"transformers=={LOWEST}.0"]
    python = make_environment(ROOT / "build" / f"transformers-{LOWEST}-project", packages, exclude_project=False)
    options = [*write_task("vqa", tmp_path), *OPTIONS, "--max_steps=1", f"--output_dir={tmp_path / 'model'}"]
    output_of(python, "-I", "-c", SMOKE, EXAMPLES, HELPERS, tmp_path, *options, cwd=tmp_path)
    said = read_json(tmp_path / "said.json")
    assert said["release"] == f"{LOWEST}.0" and said["answers"] == ["purple"] and said["layers"]
    assert (tmp_path / "model/model.safetensors").is_file()
