"""`examples/run_grounding.py`: resized boxes, scores and drawings."""

import evaluate
import pytest
from PIL import Image
from places import EXAMPLES

from trips_examples.training.pictures import draw_boxes


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
    image = Image.new("RGB", (120, 60), "white")
    draw_boxes(image, [10, 10, 50, 50], [60, 20, 100, 50])
    assert image.getpixel((10, 30)) == (0x2B, 0x8A, 0x3E)  # the left edge of the true box
    assert image.getpixel((60, 30)) == (0x18, 0x64, 0xAB)
