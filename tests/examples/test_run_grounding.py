"""`examples/run_grounding.py`: resized boxes and scores."""

import evaluate
import pytest
from places import EXAMPLES


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
