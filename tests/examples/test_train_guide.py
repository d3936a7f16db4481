"""`examples/train_guide.py` on a tiny LLaVA: its files, resuming, images that teach nothing, bad options."""

import logging
import random

import pytest
import torch
from huggingface_hub import ModelCard
from loading import write
from PIL import Image
from safetensors.torch import load_file
from tiny_vlm_processors import COLORS, make_llava_processor, make_paligemma_processor, save_tiny_vlm

from modeling_trips.hosts import TextGuide
from modeling_trips.hosts.vlm.supervision import targets_of_relevance
from trips_examples import train_guide


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_vlm("llava", tmp_path_factory.mktemp("llava"), make_llava_processor(chat_template=None))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Return images of two halves in different colors, with a question about each half."""
    folder = tmp_path_factory.mktemp("images")
    rng = random.Random(0)
    rows = []
    for number in range(8):
        upper, lower = rng.sample(COLORS, 2)
        image = Image.new("RGB", (64, 64), upper)
        image.paste(lower, (0, 32, 64, 64))
        path = str(folder / f"{number}.png")
        image.save(path)
        for color, answer in ((upper, "one"), (lower, "no")):
            rows.append({"image": path, "question": f"which one is {color} ?", "answer": answer})
    return rows


@pytest.fixture
def options(model_folder, rows, tmp_path):
    """Return a function that writes rows and returns options with them for training and evaluation."""

    def make(*more, rows=rows, folder="guide"):
        file = write(tmp_path / "rows.jsonl", rows)
        return [
            f"--model={model_folder}",
            f"--train_file={file}",
            f"--validation_file={file}",
            f"--output_dir={tmp_path / folder}",
            "--layer=1",
            "--keep_rate=0.5",
            "--warmup_steps=2",
            "--per_device_train_batch_size=5",
            "--report_to=none",
            "--save_steps=2",
            "--max_steps=5",
            *more,
        ]

    return make


def weights_of(folder):
    return {name: weight.tolist() for name, weight in load_file(folder / "model.safetensors").items()}


def test_learns_relevance(options, model_folder, tmp_path):
    before = train_guide.main(options("--max_steps=1", "--learning_rate=1e-9", folder="before"))
    metrics = train_guide.main(options("--max_steps=60", "--learning_rate=0.03"))
    assert metrics["eval_samples"] == 16
    assert metrics["eval_unused"] == 0
    assert metrics["eval_loss"] < before["eval_loss"]
    assert 0 < metrics["eval_relevance_recall"] <= 1
    guide = TextGuide.from_pretrained(tmp_path / "guide")
    assert guide(torch.randn(1, 3, 32), torch.ones(1, 3, dtype=torch.bool)).shape == (1, 4, 8)
    assert guide.layer == 1
    card = ModelCard.load(tmp_path / "guide" / "README.md")
    assert card.data.base_model == model_folder.name
    assert "rows.jsonl" in card.text
    assert "keep rate: 0.5" in card.text
    again = train_guide.main(options("--do_train=False", "--dtype=bfloat16"))
    assert again["eval_relevance_recall"] == pytest.approx(metrics["eval_relevance_recall"], abs=0.02)


def test_an_interrupted_training_resumes(options, rows, tmp_path, monkeypatch):
    """It ends with the weights of an uninterrupted one. Other options and an old guide are refused."""
    train_guide.main(options(folder="whole"))
    compute_loss = train_guide.GuideTrainer.compute_loss

    def interrupt(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return compute_loss(trainer, *args, **kwargs)

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


@pytest.mark.parametrize("make_processor", [make_paligemma_processor, make_llava_processor])
def test_the_answer_is_supervised(make_processor):
    """PaliGemma's processor puts a newline behind the prompt; LLaVA's chat template marks who speaks."""
    processor = make_processor()
    processor.tokenizer.padding_side = "left"
    processor.tokenizer.add_tokens(["\n"])
    answers = ["red", "green blue"]
    rows = []
    for answer in answers:
        row = {
            "image": Image.new("RGB", (32, 32)),
            "question": "what color is it ?",
            "answers": [answer],
            "source": "rows.jsonl row 1",
        }
        rows.append(row)
    batch = train_guide.GuideCollator(processor)(rows)
    for ids, number, answer in zip(batch["answered"]["input_ids"], batch["num_answer_tokens"], answers):
        assert processor.tokenizer.decode(ids[-number:]) == answer
    assert batch["answered"].keys() == batch["inputs"].keys() - {"labels"}


def test_images_without_relevance_are_counted(options, tmp_path, monkeypatch, caplog):
    """As where a gradient is too small for float16."""

    def targets_of(*args):
        targets = targets_of_relevance(*args)
        targets[0] = 0
        return targets

    monkeypatch.setattr(train_guide, "targets_of_relevance", targets_of)
    with caplog.at_level(logging.WARNING):
        metrics = train_guide.main(options("--num_train_epochs=1", "--max_steps=-1"))
    for split, number in (("train", 4), ("eval", 1)):  # the first of each batch
        assert metrics[f"{split}_samples"] == 16 - number
        assert metrics[f"{split}_unused"] == number
    assert caplog.text.count("of 16 images") == 2


def test_wrong_options_are_refused(options, tmp_path):
    for option in ("--keep_rate=0", "--layer=99"):
        with pytest.raises(ValueError):
            train_guide.main(options(option, folder=option.partition("=")[0]))
    assert not list(tmp_path.rglob("model.safetensors"))
