"""Accuracy of predicted boxes as an `evaluate` metric, by the rule of RefCOCO, RefCOCO+ and RefCOCOg.

A box is right where its intersection over union with the true box is at least `REFCOCO_IOU`, 0.5, or another threshold
that the caller gives. No network is needed, by import or by `evaluate.load("examples/metrics/grounding_accuracy.py")`.
"""

import datasets
import evaluate
import torch

from modeling_trips.modeling_trips_grounding import paired_box_iou


REFCOCO_IOU = 0.5

_DESCRIPTION = "Share of boxes whose intersection over union with the true box is at least 0.5, and the mean of it."

_CITATION = """\
@inproceedings{yu2016refcoco,
    title={Modeling Context in Referring Expressions},
    author={Yu, Licheng and Poirson, Patrick and Yang, Shan and Berg, Alexander C. and Berg, Tamara L.},
    booktitle={European Conference on Computer Vision (ECCV)},
    year={2016}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[float]]`): A box (x0, y0, x1, y1) for each expression, in pixels of the original image.
    references (`list[list[float]]`): The true boxes.
    threshold (`float`, *optional*, defaults to 0.5): The intersection over union from which on a box is right.

Returns:
    `dict`: `accuracy`, the share of boxes that are right, and `mean_iou`, both in [0, 1].

Raises:
    `ValueError`: Where there are no predictions.

Example:

>>> metric = evaluate.load("examples/metrics/grounding_accuracy.py")
>>> metric.compute(predictions=[[0, 0, 10, 10], [0, 0, 10, 10]], references=[[0, 0, 10, 8], [5, 0, 15, 10]])
{'accuracy': 0.5, 'mean_iou': 0.5666666...}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class GroundingAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        box = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": box, "references": box}),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[list[float]], threshold: float = REFCOCO_IOU
    ) -> dict[str, float]:
        if not predictions:
            raise ValueError("The accuracy of no boxes is undefined: give at least one.")
        boxes, true_boxes = (torch.tensor(each, dtype=torch.float64) for each in (predictions, references))
        iou = paired_box_iou(boxes, true_boxes)
        return {"accuracy": (iou >= threshold).double().mean().item(), "mean_iou": iou.mean().item()}
