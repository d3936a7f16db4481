"""`examples/run_grounding.py`: resized boxes, scores and drawings."""

import evaluate
import PIL.Image
import pytest
import torch
from places import EXAMPLES
from strange_pictures import encoded

from modeling_trips import TripsConfig
from trips_examples.data.collators import GroundingCollator
from trips_examples.data.vocabulary import train_tokenizer
from trips_examples.training.models import make_processor
from trips_examples.training.pictures import draw_boxes


@pytest.fixture(scope="module")
def processor():
    return make_processor(train_tokenizer(["the red left right square"]), TripsConfig.from_preset("tiny"))


def row(image_id: str, box: list[int]) -> dict:
    """Return a row with an image of 100 x 50 pixels (width x height), red in the box and black elsewhere."""
    image = PIL.Image.new("RGB", (100, 50))
    image.paste("red", box)
    return {
        "image": {"bytes": encoded(image), "path": None},
        "image_id": image_id,
        "expression": "the left square",
        "box": box,
        "source": f"toy row {image_id}",
    }


def red_box(pixels: torch.Tensor) -> list[float]:
    """Return the relative box (center_x, center_y, width, height) of red pixels in `pixel_values` (3, 64, 64)."""
    ys, xs = torch.nonzero(pixels[0] > 0.5, as_tuple=True)
    x0 = xs.min().item() / 64
    x1 = (xs.max().item() + 1) / 64
    y0 = ys.min().item() / 64
    y1 = (ys.max().item() + 1) / 64
    return [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]


def test_labels_are_where_the_pixels_are_after_resizing(processor):
    """Images are resized from 100 x 50 to 64 x 64 pixels, and the label is compared with the red pixels."""
    rows = [row("a", [10, 5, 40, 25]), row("b", [60, 20, 90, 45]), row("c", [0, 0, 100, 20])]
    batch = GroundingCollator(processor)(rows)
    for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True):
        assert label.tolist() == pytest.approx(red_box(pixels), abs=0.02)


def test_accuracy_counts_boxes_from_half_overlap_on():
    metric = evaluate.load(str(EXAMPLES / "metrics/grounding_accuracy.py"))
    references = [[0.0, 0.0, 10.0, 10.0]] * 4
    predictions = [
        [0.0, 0.0, 10.0, 10.0],
        [0.0, 0.0, 10.0, 5.0],  # IoU of 50 / 100
        [5.0, 5.0, 15.0, 15.0],  # 25 / 175
        [20.0, 20.0, 30.0, 30.0],
    ]
    result = metric.compute(predictions=predictions, references=references)
    assert result["accuracy"] == 0.5
    assert result["mean_iou"] == pytest.approx((1 + 0.5 + 25 / 175) / 4)
    result = metric.compute(predictions=predictions, references=references, threshold=0.51)
    assert result["accuracy"] == 0.25
    with pytest.raises(ValueError, match="at least one"):
        metric.compute(predictions=[], references=[])


def test_pictures_show_both_boxes():
    image = PIL.Image.new("RGB", (120, 60), "white")
    draw_boxes(image, [10, 10, 50, 50], [60, 20, 100, 50])
    assert image.getpixel((10, 30)) == (0x2B, 0x8A, 0x3E)  # the left edge of the true box
    assert image.getpixel((60, 30)) == (0x18, 0x64, 0xAB)
