"""Grounding accuracy as an `evaluate` metric, by the rule of RefCOCO, RefCOCO+ and RefCOCOg (arXiv 1608.00272).

The metric needs no network, also by `evaluate.load("examples/metrics/grounding_accuracy.py")`.
"""

import datasets
import evaluate
import torch

from modeling_trips.modeling_trips_grounding import paired_box_iou


class GroundingAccuracy(evaluate.Metric):
    """
    Share of boxes with an intersection over union of at least 0.5 with the true box, and the mean IoU.

    Args:
        predictions (`list[list[float]]`): A box (x0, y0, x1, y1) for each expression, in pixels of the original image.
        references (`list[list[float]]`): The true boxes.
        threshold (`float`, *optional*, defaults to 0.5): Smallest intersection over union of a correct box.

    Returns:
        `dict`: `accuracy`, the share of correct boxes, and `mean_iou`, both in [0, 1].

    Raises:
        `ValueError`: There are no predictions.

    Example:

    >>> metric = evaluate.load("examples/metrics/grounding_accuracy.py")
    >>> metric.compute(predictions=[[0, 0, 10, 10], [0, 0, 10, 10]], references=[[0, 0, 10, 8], [5, 0, 15, 10]])
    {'accuracy': 0.5, 'mean_iou': 0.5666666...}
    """

    def _info(self) -> evaluate.MetricInfo:
        box = datasets.Sequence(datasets.Value("float64"))
        features = datasets.Features({"predictions": box, "references": box})
        return evaluate.MetricInfo(description=self.__doc__, citation="arXiv 1608.00272", features=features)

    def _compute(
        self, predictions: list[list[float]], references: list[list[float]], threshold: float = 0.5
    ) -> dict[str, float]:
        if not predictions:
            raise ValueError("There are no predictions. Give at least one.")
        boxes = torch.tensor(predictions, dtype=torch.float64)
        true_boxes = torch.tensor(references, dtype=torch.float64)
        iou = paired_box_iou(boxes, true_boxes)
        is_right = (iou >= threshold).double()
        return {
            "accuracy": is_right.mean().item(),
            "mean_iou": iou.mean().item(),
        }
