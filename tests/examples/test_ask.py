"""`examples/ask.py` as a user runs it, and the checkpoint that comes with the project."""

import os
import shutil
import subprocess
import sys
import zipfile

import PIL.Image
import pytest
import torch
from easy_vqa import get_test_image_paths, get_test_questions
from places import EXAMPLES, ROOT
from safetensors import safe_open

from modeling_trips import TripsForQuestionAnswering, TripsProcessor
from trips_examples import ask


def run(*options: str, cwd) -> subprocess.CompletedProcess:
    words = [sys.executable, str(EXAMPLES / "ask.py"), *options]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


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
    assert result.stdout.count("unpruned: ") == len(ask.QUESTIONS)
    assert "50% of the tokens after layer 2, 50% of the tokens after layer 3" in result.stdout
    assert result.stdout.count(" times as fast") == 2
    with PIL.Image.open(tmp_path / "outputs/kept_patches.png") as picture:  # the original and a panel per question
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(10**6)) > 20


@pytest.mark.slow
def test_a_picture_that_is_none_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    result = run("--image", "notes.txt", cwd=tmp_path)
    assert result.returncode == 1 and "--image notes.txt: cannot read it as a picture" in result.stderr


def test_asks_what_it_is_told_to(tmp_path, capsys):
    """Of a picture of any size and mode, as rows and columns of one colour show; an unpruned model has no patches."""
    PIL.Image.new("RGBA", (150, 90), "teal").save(tmp_path / "picture.png")
    twin = TripsForQuestionAnswering.from_pretrained(ask.CHECKPOINT, keep_rate=1.0)
    twin.save_pretrained(tmp_path / "twin")
    TripsProcessor.from_pretrained(ask.CHECKPOINT).save_pretrained(tmp_path / "twin")
    options = ["--image", str(tmp_path / "picture.png"), "--question", "is there a circle?"]
    ask.main([*options, "--model", str(tmp_path / "twin"), "--picture", str(tmp_path / "kept.png")])
    printed = capsys.readouterr().out
    assert printed.count("  is there a circle? ") == 1 and "It keeps" not in printed
    assert not (tmp_path / "kept.png").exists()


def test_the_scores_are_the_probabilities_of_the_answers(model, processor):
    image = PIL.Image.open(get_test_image_paths()[0])
    (best,) = ask.answers_of(model, processor, image, ["what color is the shape?"])
    colors = ["red", "green", "blue", "black", "gray", "teal", "brown", "yellow"]
    inputs = processor(images=image, text="what color is the shape?", return_tensors="pt")
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
    assert model.config.vision_config.selection_schedule == {2: 0.5, 3: 0.5}


def test_the_shipped_checkpoint_answers_95_percent_of_the_first_500_test_questions(model, processor):
    questions, truths, image_ids = (column[:500] for column in get_test_questions())
    position = {image_id: index for index, image_id in enumerate(dict.fromkeys(image_ids))}
    images = [PIL.Image.open(get_test_image_paths()[image_id]) for image_id in position]
    image_index = [position[image_id] for image_id in image_ids]
    inputs = processor(images=images, text=questions, image_index=image_index, return_tensors="pt")
    answers = processor.post_process_answers(model.generate(**inputs))
    assert sum(answer == truth for answer, truth in zip(answers, truths)) >= 475


def test_its_card_says_how_it_was_made_and_what_it_reaches():
    card = (ask.CHECKPOINT / "README.md").read_text()
    assert "Made by `python examples/demo.py --publish_to examples/trips-tiny-easy-vqa" in card
    assert "easy-VQA, test, 9,673 examples | 0.9" in card
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
    assert {f"trips_examples/{path.relative_to(EXAMPLES)}" for path in ask.CHECKPOINT.iterdir()} <= packed
