"""`examples/train_guide.py` on a tiny LLaVA: its files, resuming, both teachers, bad options."""

import itertools
import json
import random
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from tiny_vlm_processors import COLORS, make_llava_processor, make_paligemma_processor, save_tiny_vlm

from modeling_trips.hosts import TextGuide
from trips_examples import train_guide


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny_vlm("llava", tmp_path_factory.mktemp("llava"), make_llava_processor(chat_template=None))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Write images of two halves in different colors, with a question about each half; the last has no region."""
    folder = tmp_path_factory.mktemp("data")
    rows, rng = [], random.Random(0)
    for number in range(8):
        colors = rng.sample(COLORS, 2)
        image = PIL.Image.new("RGB", (64, 64), colors[0])
        image.paste(PIL.Image.new("RGB", (64, 32), colors[1]), (0, 32))
        image.save(folder / f"{number}.png")
        for half, color in enumerate(colors):
            row = {"image": f"{number}.png", "question": f"which one is {color} ?", "answer": ("one", "no")[half]}
            rows.append({**row, "region": [0, 32 * half, 64, 32 * half + 32]})
    del rows[-1]["region"]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def options(model_folder: Path, data: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        f"--model_name_or_path={model_folder}",
        f"--train_file={data}",
        f"--validation_file={data}",
        f"--output_dir={output_dir}",
        "--layer=1",
        "--keep_rate=0.5",
        "--batch_size=5",
        "--warmup_steps=2",
        *more,
    ]


def test_learns_the_regions(model_folder, data, tmp_path):
    metrics = train_guide.main(options(model_folder, data, tmp_path, "--max_steps=60", "--learning_rate=0.03"))
    assert metrics["eval_samples"] == 15  # one row has no region
    assert metrics["eval_region_recall"] > 0.65  # 0.5 at random
    guide = TextGuide.from_pretrained(tmp_path)
    assert guide(torch.randn(1, 3, 32), torch.ones(1, 3, dtype=torch.bool)).shape == (1, 4, 8)
    assert guide.layer == 1
    assert json.loads((tmp_path / "eval_results.json").read_text()).items() >= metrics.items()


def test_resumes(model_folder, data, tmp_path, monkeypatch):
    """An interrupted and resumed run ends with the guide of an uninterrupted run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_guide.main(options(model_folder, data, whole, "--max_steps=5", "--save_steps=2"))
    loss_and_recall, calls = train_guide.GuideTrainer.loss_and_recall, itertools.count()

    def interrupt(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return loss_and_recall(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_guide.GuideTrainer, "loss_and_recall", interrupt)
        train_guide.main(options(model_folder, data, parts, "--max_steps=5", "--save_steps=2"))
    assert not (parts / "model.safetensors").exists()
    train_guide.main(options(model_folder, data, parts, "--max_steps=5", "--save_steps=2"))
    resumed = load_file(parts / "model.safetensors")
    for name, expected in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(resumed[name], expected)


def test_learns_from_attention(model_folder, data, tmp_path):
    metrics = train_guide.main(options(model_folder, data, tmp_path, "--teacher=attention", "--max_steps=3"))
    assert metrics["eval_samples"] == 16
    assert 0 < metrics["eval_region_recall"] <= 1


def test_the_answer_of_paligemma_is_supervised():
    """Its processor puts a newline behind the prompt."""
    processor = make_paligemma_processor()
    processor.tokenizer.add_tokens(["\n"])
    answers = ["red", "green blue"]
    image = PIL.Image.new("RGB", (32, 32))
    row = {"image": image, "question": "what color is it ?", "region": None}
    batch = train_guide.GuideCollator(processor, "attention")([row | {"answers": [answer]} for answer in answers])
    for ids, number, answer in zip(batch["answered"]["input_ids"], batch["num_answer_tokens"], answers):
        assert processor.tokenizer.decode(ids[-number:]) == answer
    assert {*batch["answered"]} == {*batch["inputs"]} - {"labels"}


def test_regions_outside_the_crop_are_no_targets(model_folder, tmp_path):
    PIL.Image.new("RGB", (192, 64), "red").save(tmp_path / "0.png")
    row = {"image": "0.png", "question": "which one is red ?", "answer": "one", "region": [0, 0, 20, 20]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    data, output_dir = tmp_path / "rows.jsonl", tmp_path / "guide"
    metrics = train_guide.main(options(model_folder, data, output_dir, "--max_steps=2", "--save_steps=1"))
    assert metrics["eval_samples"] == 0
    assert all(value.isfinite().all() for value in load_file(output_dir / "model.safetensors").values())


def test_data_without_regions_are_refused(model_folder, data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    without = data.parent / "without.jsonl"
    without.write_text("\n".join(json.dumps({**row, "region": None}) for row in rows))
    with pytest.raises(ValueError, match="--teacher attention"):
        train_guide.main(options(model_folder, without, tmp_path))
