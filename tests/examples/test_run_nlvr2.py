"""`examples/run_nlvr2.py`: batches with shared images, and a run on toy statements."""

import io

import PIL.Image
import pytest
import torch
from toy_tasks import OPTIONS, write_task

from modeling_trips import TripsConfig, TripsForImagesAndTextClassification, TripsProcessor
from trips_examples import run_nlvr2
from trips_examples.data.task_collators import Nlvr2Collator
from trips_examples.data.vocabulary import train_wordpiece_tokenizer
from trips_examples.training.models import make_processor


def encoded(color: str) -> dict:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def row(left: str, right: str, label: int) -> dict:
    return {
        "images": [encoded(left), encoded(right)],
        "image_ids": [left, right],
        "statement": f"both are {left}",
        "label": label,
        "source": f"toy row {left}-{right}",
    }


@pytest.fixture(scope="module")
def processor():
    return make_processor(train_wordpiece_tokenizer(["both are red blue green"]), TripsConfig.from_preset("tiny"))


def test_collator_decodes_each_image_once_and_keeps_left_and_right(processor):
    batch = Nlvr2Collator(processor)([row("red", "blue", 1), row("blue", "blue", 0), row("green", "red", 1)])
    assert batch["image_index"].tolist() == [[0, 1], [1, 1], [2, 0]]
    assert batch["labels"].tolist() == [1, 0, 1]
    red, blue, green = batch["pixel_values"].mean(dim=(2, 3))
    assert red.argmax() == 0 and green.argmax() == 1 and blue.argmax() == 2
    assert batch["sources"] == ["toy row red-blue", "toy row blue-blue", "toy row green-red"]


def test_a_broken_image_is_named_by_its_row(processor):
    bad = row("red", "blue", 1)
    bad["images"][1] = {"bytes": bad["images"][1]["bytes"][:50], "path": None}
    with pytest.raises(ValueError, match="toy row red-blue: unreadable image"):
        Nlvr2Collator(processor)([row("green", "red", 0), bad])


def test_predictions_hold_the_probability_of_true():
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]]).numpy()
    judgements = run_nlvr2.judgements_of(logits)
    assert [judgement["prediction"] for judgement in judgements] == [1, 0, 0]
    probabilities = [judgement["probability"] for judgement in judgements]
    assert probabilities == pytest.approx([0.8808, 0.2689, 0.0474], abs=1e-4)


@pytest.mark.slow
def test_learns_the_toy_data_and_leaves_a_model_that_judges(tmp_path):
    options = [*write_task("nlvr2", tmp_path), *OPTIONS, "--max_steps=150", "--per_device_train_batch_size=10"]
    metrics = run_nlvr2.main([*options, f"--output_dir={tmp_path / 'out'}"])
    assert metrics["eval_accuracy"] == 1.0
    folder = tmp_path / "out"
    model, processor = (
        TripsForImagesAndTextClassification.from_pretrained(folder),
        TripsProcessor.from_pretrained(folder),
    )
    images = [PIL.Image.new("RGB", (64, 64), color) for color in ("green", "blue")]
    inputs = processor(images, ["both are green"] * 2, image_index=[[0, 0], [0, 1]], return_tensors="pt")
    assert model.eval()(**inputs).logits.argmax(dim=-1).tolist() == [1, 0]
