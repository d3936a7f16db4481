# SPDX-FileCopyrightText: 2026 The TRIPS for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The pipeline of retrieval models: zero-shot image classification."""

from transformers import ZeroShotImageClassificationPipeline

from .pipeline_trips import TripsPipeline, given
from .processing_trips import read_image


class TripsZeroShotImageClassificationPipeline(TripsPipeline, ZeroShotImageClassificationPipeline):
    """
    Pipeline that ranks labels of an image, under the task name `"zero-shot-image-classification"`.

    Arguments and results are those of Transformers' pipeline, and `keep_rate` and `schedule` are those of the model.
    Images and texts go through [`TripsProcessor`], as in training.

    ```python
    >>> from transformers import pipeline

    >>> classifier = pipeline("zero-shot-image-classification", model="org/trips-retrieval", trust_remote_code=True)
    >>> classifier = TripsZeroShotImageClassificationPipeline(model=model, processor=processor)  # or a loaded model
    >>> classifier("picture.png", candidate_labels=["red", "blue"], hypothesis_template="a {} square")
    [{'score': 0.98, 'label': 'red'}, {'score': 0.02, 'label': 'blue'}]
    ```
    """

    default_task = "zero-shot-image-classification"

    def _sanitize_parameters(self, keep_rate=None, schedule=None, **kwargs):
        preprocess_params, _, _ = super()._sanitize_parameters(**kwargs)
        return preprocess_params, given(keep_rate=keep_rate, schedule=schedule), {}

    def preprocess(
        self,
        image,
        candidate_labels=None,
        hypothesis_template="This is a photo of {}.",
        timeout=None,
    ):
        inputs = self.processor(images=read_image(image, timeout), return_tensors="pt")
        inputs = inputs.to(self.dtype)
        texts = [hypothesis_template.format(label) for label in candidate_labels]
        text_inputs = self.processor(text=texts, return_tensors="pt")
        inputs["candidate_labels"] = candidate_labels
        inputs["text_inputs"] = [text_inputs]
        return inputs

    def _forward(self, model_inputs, **selection):
        return super()._forward({**model_inputs, **selection})


__all__ = ["TripsZeroShotImageClassificationPipeline"]
