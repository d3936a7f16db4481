"""Grounding accuracy by the rule of RefCOCO, RefCOCO+ and RefCOCOg (arXiv 1608.00272)."""

import torch

from modeling_trips.modeling_trips_grounding import paired_box_iou


def grounding_scores(predictions: list[list[float]], references: list[list[float]]) -> dict[str, float]:
    """
    Return `accuracy`, the share of boxes with an intersection over union (IoU) of at least 0.5 with the true box, and
    `mean_iou`, both in [0, 1].

    Args:
        predictions (`list[list[float]]`): A box (x0, y0, x1, y1) for each expression, in pixels of the original image.
        references (`list[list[float]]`): The true boxes.

    Example:

    >>> grounding_scores([[0, 0, 10, 10], [0, 0, 10, 10]], [[0, 0, 10, 8], [5, 0, 15, 10]])
    {'accuracy': 0.5, 'mean_iou': 0.5666666...}
    """
    boxes = torch.tensor(predictions, dtype=torch.float64)
    true_boxes = torch.tensor(references, dtype=torch.float64)
    iou = paired_box_iou(boxes, true_boxes)
    is_right = (iou >= 0.5).double()
    return {
        "accuracy": is_right.mean().item(),
        "mean_iou": iou.mean().item(),
    }
