"""`examples/train_guide.py` on a tiny LLaVA: its files, resuming, its teachers, lost rows, bad options."""

import itertools
import json
import logging
import random
from pathlib import Path

import PIL.Image
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_vlm_processors import COLORS, make_llava_processor, make_paligemma_processor, save_tiny_vlm

from modeling_trips.hosts import TextGuide
from trips_examples import train_guide


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny_vlm("llava", tmp_path_factory.mktemp("llava"), make_llava_processor(chat_template=None))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """Return images of two halves in different colors, with a question about each half; the last has no region."""
    folder = tmp_path_factory.mktemp("images")
    rows, rng = [], random.Random(0)
    for number in range(8):
        colors = rng.sample(COLORS, 2)
        image = PIL.Image.new("RGB", (64, 64), colors[0])
        image.paste(PIL.Image.new("RGB", (64, 32), colors[1]), (0, 32))
        image.save(folder / f"{number}.png")
        for half, color in enumerate(colors):
            row = {"image": str(folder / f"{number}.png"), "question": f"which one is {color} ?"}
            rows.append({**row, "answer": ("one", "no")[half], "region": [0, 32 * half, 64, 32 * half + 32]})
    del rows[-1]["region"]
    return rows


@pytest.fixture
def options(model_folder, rows, tmp_path):
    """Return a function that writes rows and returns options with them for training and evaluation."""

    def make(*more: str, rows: list[dict] = rows, folder: str = "guide") -> list[str]:
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        options = {"model": model_folder, "train_file": file, "validation_file": file}
        options |= {"output_dir": tmp_path / folder, "layer": 1, "keep_rate": 0.5, "warmup_steps": 2}
        options |= {"per_device_train_batch_size": 5, "report_to": "none", "save_steps": 2, "max_steps": 5}
        return [*(f"--{name}={value}" for name, value in options.items()), *more]

    return make


def weights_of(folder: Path) -> dict[str, list]:
    return {name: weight.tolist() for name, weight in load_file(folder / "model.safetensors").items()}


def test_learns_the_regions(options, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        metrics = train_guide.main(options("--max_steps=60", "--learning_rate=0.03"))
    assert "1 of the 16 rows" in caplog.text  # without a region
    assert (metrics["eval_samples"], metrics["eval_cropped"]) == (15, 0)
    assert metrics["eval_region_recall"] > 0.65  # 0.5 at random
    guide = TextGuide.from_pretrained(tmp_path / "guide")
    assert guide(torch.randn(1, 3, 32), torch.ones(1, 3, dtype=torch.bool)).shape == (1, 4, 8)
    assert guide.layer == 1
    card = ModelCard.load(tmp_path / "guide" / "README.md")
    assert card.data.base_model == Path(options()[0].partition("=")[2]).name
    assert "rows.jsonl" in card.text and "teacher: regions" in card.text and "keep rate: 0.5" in card.text
    again = train_guide.main(options("--do_train=False", "--dtype=bfloat16"))
    assert again["eval_region_recall"] == pytest.approx(metrics["eval_region_recall"], abs=0.02)


def test_an_interrupted_training_resumes(options, rows, tmp_path, monkeypatch):
    """It ends with the weights of an uninterrupted one. Other options and an old guide are refused."""
    train_guide.main(options(folder="whole"))
    compute_loss, calls = train_guide.GuideTrainer.compute_loss, itertools.count()

    def interrupt(*args, **kwargs):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return compute_loss(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_guide.GuideTrainer, "compute_loss", interrupt)
        train_guide.main(options())
    assert not (tmp_path / "guide" / "model.safetensors").exists()
    with pytest.raises(FileExistsError, match="resume_from_checkpoint"):
        train_guide.main(options())
    resume = "--resume_from_checkpoint=last"
    with pytest.raises(ValueError, match="layer .*learning_rate .*, now"):
        train_guide.main(options(resume, "--layer=2", "--learning_rate=0.5"))
    answered = [{**row, "answer": "maybe"} for row in rows]  # the same questions
    with pytest.raises(ValueError, match="data .*, now"):
        train_guide.main(options(resume, rows=answered))
    for _ in range(2):  # the second has nothing left to train
        train_guide.main(options(resume))
        assert weights_of(tmp_path / "guide") == weights_of(tmp_path / "whole")


def test_learns_from_attention(options):
    metrics = train_guide.main(options("--teacher=attention", "--max_steps=3"))
    assert metrics["eval_samples"] == 16
    assert 0 < metrics["eval_region_recall"] <= 1


def test_learns_from_answers(options, rows, tmp_path):
    """Rows count with and without a region; regions are for the recall only."""
    metrics = train_guide.main(options("--teacher=answers"))
    assert (metrics["eval_samples"], metrics["eval_cropped"]) == (16, 0)
    assert 0 < metrics["eval_region_recall"] <= 1
    without = [{name: value for name, value in row.items() if name != "region"} for row in rows]
    again = train_guide.main(options("--teacher=answers", rows=without, folder="without"))
    assert again["eval_loss"] == metrics["eval_loss"] and "eval_region_recall" not in again


@pytest.mark.parametrize("make_processor", [make_paligemma_processor, make_llava_processor])
def test_the_answer_is_supervised(make_processor):
    """PaliGemma's processor puts a newline behind the prompt; LLaVA's chat template marks who speaks."""
    processor = make_processor()
    processor.tokenizer.padding_side = "left"
    processor.tokenizer.add_tokens(["\n"])
    answers = ["red", "green blue"]
    image = PIL.Image.new("RGB", (32, 32))
    row = {"image": image, "question": "what color is it ?", "region": None, "source": "rows.jsonl row 1"}
    batch = train_guide.GuideCollator(processor, "attention")([row | {"answers": [answer]} for answer in answers])
    for ids, number, answer in zip(batch["answered"]["input_ids"], batch["num_answer_tokens"], answers):
        assert processor.tokenizer.decode(ids[-number:]) == answer
    assert {*batch["answered"]} == {*batch["inputs"]} - {"labels"}


def test_regions_outside_the_crop_are_counted(options, rows, tmp_path, caplog):
    image = PIL.Image.new("RGB", (192, 64), "red")
    image.save(tmp_path / "wide.png")
    cropped = {**rows[0], "image": str(tmp_path / "wide.png"), "region": [0, 0, 20, 20]}
    with caplog.at_level(logging.WARNING):
        metrics = train_guide.main(options("--num_train_epochs=1", "--max_steps=-1", rows=[*rows, *[cropped] * 5]))
    assert (metrics["train_samples"], metrics["train_cropped"]) == (15, 5)
    assert (metrics["eval_samples"], metrics["eval_cropped"]) == (15, 5)
    assert caplog.text.count("5 of the 20 rows") == 2


def test_wrong_options_and_data_are_refused(options, rows, tmp_path):
    for option in ("--selection_gate=0", "--layer=99"):
        with pytest.raises(ValueError):
            train_guide.main(options(option, folder=option.partition("=")[0]))
    with pytest.raises(ValueError, match="--teacher attention"):
        train_guide.main(options(rows=[{**row, "region": None} for row in rows]))
    assert not [*tmp_path.rglob("model.safetensors")]
