"""`examples/ask.py` as a user runs it, and the checkpoint that comes with the project."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from places import EXAMPLES, ROOT
from programs import add_fake_ghostscript
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from schedules import rates_of

from modeling_trips import TripsConfig, TripsForQuestionAnswering, TripsForVisualGrounding, TripsProcessor
from trips_examples import ask
from trips_examples.analysis import SAME_WEIGHTS
from trips_examples.data.rows import read_image
from trips_examples.data.scenes import scene_records


def run(*options: str, cwd) -> subprocess.CompletedProcess:
    words = [sys.executable, str(EXAMPLES / "ask.py"), *options]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def write_photo(path: Path):
    """A JPEG of 4000 x 3000 pixels and about 5 MB: smooth gradients, with noise."""
    y, x = np.mgrid[0:3000, 0:4000].astype(np.float32)
    gradients = np.stack([100 * np.sin(x / 700 + y / 900), 90 * np.cos(x / 500), 80 * np.sin(y / 400)], axis=-1)
    noise = np.random.default_rng(0).normal(128, 12, (1500, 2000, 3)).repeat(2, axis=0).repeat(2, axis=1)
    PIL.Image.fromarray(np.clip(gradients + noise, 0, 255).astype(np.uint8)).save(path, quality=90)


@pytest.fixture(scope="module")
def model() -> TripsForQuestionAnswering:
    return TripsForQuestionAnswering.from_pretrained(ask.CHECKPOINT).eval()


@pytest.fixture(scope="module")
def processor() -> TripsProcessor:
    return TripsProcessor.from_pretrained(ask.CHECKPOINT)


@pytest.mark.slow
def test_answers_draws_and_compares_without_any_option(tmp_path):
    result = run(cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    for question in ask.QUESTIONS:
        assert result.stdout.count(f"  {question} ") == 1
    assert result.stdout.count(f" {SAME_WEIGHTS}: ") == len(ask.QUESTIONS)
    assert "unpruned: " not in result.stdout
    assert "25% of the tokens after layer 2" in result.stdout
    assert result.stdout.count(" times as fast") == 2
    with PIL.Image.open(tmp_path / "outputs/kept_patches.png") as picture:  # the original and a panel per question
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(10**6)) > 20


@pytest.mark.slow
def test_a_photo_of_12_megapixels_takes_neither_long_nor_much_memory(tmp_path):
    """20 s of the processor's time, which other programs do not lengthen, and 1.5 GB."""
    write_photo(tmp_path / "photo.jpg")
    code = (
        "import time; from pathlib import Path; from trips_examples import ask; ask.main(['--image', 'photo.jpg']); "
        "print('seconds:', time.process_time()); print(Path('/proc/self/status').read_text())"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert float(re.search(r"seconds: (\S+)", printed)[1]) < 20
    assert int(re.search(r"VmHWM:\s+(\d+) kB", printed)[1]) < 1.5e6
    with PIL.Image.open(tmp_path / "outputs/kept_patches.png") as drawing:
        assert 1000 < drawing.width < 4000


@pytest.mark.slow
def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    result = run("--image", "notes.txt", cwd=tmp_path)
    assert result.returncode == 1 and "--image notes.txt: " in result.stderr and "Traceback" not in result.stderr


def test_eps_is_refused_without_a_program_being_started(tmp_path, monkeypatch):
    image, started = add_fake_ghostscript(tmp_path, monkeypatch.setenv)
    with pytest.raises(SystemExit, match="EPS"):
        ask.main(["--image", str(image)])
    assert not started.exists()


def test_a_checkpoint_with_another_head_is_refused(tmp_path):
    TripsForVisualGrounding(TripsConfig.from_preset("tiny")).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="TripsForVisualGrounding"):
        ask.main(["--model", str(tmp_path)])


def test_a_checkpoint_without_all_its_weights_is_refused(tmp_path):
    shutil.copytree(ask.CHECKPOINT, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    lost = next(name for name in weights if name.startswith("model.vision_model"))
    del weights[lost]
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=lost):
        ask.main(["--model", str(tmp_path / "model")])


@pytest.mark.slow
def test_an_exported_model_answers_as_its_checkpoint(model, processor, tmp_path, capsys):
    export = pytest.importorskip("modeling_trips.export")
    export.export_model(model, tmp_path / "exported", "onnx")
    processor.save_pretrained(tmp_path / "exported")
    capsys.readouterr()
    options = ["--picture", str(tmp_path / "kept.png"), "--question", "what color is the circle?"]
    ask.main([*options, "--model", str(tmp_path / "exported")])
    exported = capsys.readouterr().out
    ask.main(options)
    (line,) = [line for line in exported.splitlines() if line.startswith("  what color is the circle? ")]
    assert " yellow (" in line and line in capsys.readouterr().out
    assert SAME_WEIGHTS not in exported and "64 x an image and a question: " in exported
    assert (tmp_path / "kept.png").exists()


def test_asks_a_model_that_keeps_all_patches(tmp_path, capsys):
    """About an image of another size and mode. There are no kept patches, and nothing to compare."""
    PIL.Image.new("RGBA", (150, 90), "teal").save(tmp_path / "picture.png")
    unpruned = TripsForQuestionAnswering.from_pretrained(ask.CHECKPOINT, keep_rate=1.0)
    unpruned.save_pretrained(tmp_path / "unpruned")
    TripsProcessor.from_pretrained(ask.CHECKPOINT).save_pretrained(tmp_path / "unpruned")
    options = ["--image", str(tmp_path / "picture.png"), "--question", "is there a circle?"]
    ask.main([*options, "--model", str(tmp_path / "unpruned"), "--picture", str(tmp_path / "kept.png")])
    printed = capsys.readouterr().out
    assert printed.count("  is there a circle? ") == 1 and "It keeps" not in printed and "rate" not in printed
    assert not (tmp_path / "kept.png").exists()


def test_the_scores_are_the_probabilities_of_the_answers(model, processor):
    image = PIL.Image.open(ask.SCENE)
    (best,) = ask.answers_of(model, processor, image, ["what color is the circle?"])
    colors = ["red", "green", "blue", "black", "gray", "teal", "brown", "yellow"]
    inputs = processor(images=image, text="what color is the circle?", return_tensors="pt")
    ranking = model.rank_answers(processor.encode_answers(colors), k=len(colors), **inputs)
    assert best["answer"] == colors[ranking.answer_indices[0, 0]]
    assert best["score"] == pytest.approx(ranking.scores[0, 0].exp().item(), abs=1e-5)


def test_the_shipped_checkpoint_is_small_and_holds_no_code():
    assert sum(path.stat().st_size for path in ask.CHECKPOINT.iterdir()) < 5_000_000
    assert {path.suffix for path in ask.CHECKPOINT.iterdir()} == {".json", ".safetensors", ".md"}
    with safe_open(ask.CHECKPOINT / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys() if "num_batches" not in name} == {
            "BF16"
        }
    for path in ask.CHECKPOINT.glob("*.json"):
        assert "auto_map" not in path.read_text()


def test_the_shipped_checkpoint_loads_whole_and_in_float32():
    model, report = TripsForQuestionAnswering.from_pretrained(ask.CHECKPOINT, output_loading_info=True)
    assert model.dtype == torch.float32
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert rates_of(model.config.vision_config) == {2: 0.25}


def test_the_shipped_checkpoint_answers_95_percent_of_the_questions_about_80_test_scenes(model, processor):
    records = list(scene_records("vqa", "test", 80))
    images = {record["image_id"]: read_image(record) for record in records}
    inputs = processor(
        images=list(images.values()),
        text=[record["question"] for record in records],
        image_index=[list(images).index(record["image_id"]) for record in records],
        return_tensors="pt",
    )
    answers = processor.post_process_answers(model.generate(**inputs))
    right = [answer == record["answer"] for answer, record in zip(answers, records)]
    assert len(right) > 400 and sum(right) >= 0.95 * len(right)


def test_its_card_says_how_it_was_made_and_what_it_reaches():
    card = (ask.CHECKPOINT / "README.md").read_text()
    assert "Made by `python examples/demo.py --publish_to examples/trips-tiny-scenes" in card
    assert re.search(r"composed scenes, test, [\d,]+ examples \| 0.9", card)
    assert "trust_remote_code" not in card and "import modeling_trips" in card


def test_its_card_s_code_runs_as_it_stands(monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = (ask.CHECKPOINT / "README.md").read_text().split("```python\n")[1:]
    namespace = {}
    exec(compile(block.split("```")[0], "README.md", "exec"), namespace)
    assert namespace["model"].config.architectures == ["TripsForQuestionAnswering"]


@pytest.mark.slow
def test_the_shipped_checkpoint_is_in_the_wheel(tmp_path):
    names = ("examples", "modeling_trips", "serving", "pyproject.toml", "README.md", "*_trips.py")
    source = tmp_path / "source"
    source.mkdir()
    for path in (path for name in names for path in ROOT.glob(name)):
        shutil.copytree(path, source / path.name) if path.is_dir() else shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    paths = [ask.SCENE, *ask.CHECKPOINT.iterdir()]
    assert {f"trips_examples/{path.relative_to(EXAMPLES)}" for path in paths} <= packed
