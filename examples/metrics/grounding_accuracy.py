"""Grounding accuracy by the rule of RefCOCO, RefCOCO+ and RefCOCOg (arXiv 1608.00272)."""

import torch

from modeling_trips.modeling_trips_grounding import paired_box_iou


def grounding_accuracy(predictions: list[list[float]], references: list[list[float]]) -> dict[str, float]:
    """
    Score a box (x0, y0, x1, y1) for each expression, in pixels of the original image, against the true boxes.

    Returns:
        `dict[str, float]`: `accuracy`, the share of boxes with an intersection over union of at least 0.5, and
        `mean_iou`, both in [0, 1].
    """
    boxes, true_boxes = (torch.tensor(each, dtype=torch.float64) for each in (predictions, references))
    iou = paired_box_iou(boxes, true_boxes)
    return {"accuracy": (iou >= 0.5).double().mean().item(), "mean_iou": iou.mean().item()}
