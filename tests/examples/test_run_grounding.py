"""`examples/run_grounding.py`: scores of boxes."""

import pytest

from trips_examples.metrics.grounding_accuracy import grounding_scores


def test_accuracy_counts_boxes_from_half_overlap_on():
    references = [[0.0, 0.0, 10.0, 10.0]] * 4
    predictions = [
        [0.0, 0.0, 10.0, 10.0],
        [0.0, 0.0, 10.0, 5.0],  # IoU of 50 / 100
        [5.0, 5.0, 15.0, 15.0],  # 25 / 175
        [20.0, 20.0, 30.0, 30.0],
    ]
    result = grounding_scores(predictions, references)
    assert result["accuracy"] == 0.5
    assert result["mean_iou"] == pytest.approx((1 + 0.5 + 25 / 175) / 4)
