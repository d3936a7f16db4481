# SPDX-FileCopyrightText: 2026 The TRIPS for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""The pipeline of retrieval models: zero-shot image classification."""

from transformers import ZeroShotImageClassificationPipeline

from .pipeline_trips import TripsPipeline
from .processing_trips import read_image


class TripsZeroShotImageClassificationPipeline(TripsPipeline, ZeroShotImageClassificationPipeline):
    """
    Pipeline that ranks labels of an image, under the task name `"zero-shot-image-classification"`.

    Arguments and results are those of Transformers' pipeline. Images and texts go through [`TripsProcessor`], as in
    training.

    ```python
    >>> from transformers import pipeline

    >>> classifier = pipeline("zero-shot-image-classification", model="org/trips-retrieval", trust_remote_code=True)
    >>> classifier = TripsZeroShotImageClassificationPipeline(model=model, processor=processor)  # or a loaded model
    >>> classifier("picture.png", candidate_labels=["red", "blue"], hypothesis_template="a {} square")
    [{'score': 0.98, 'label': 'red'}, {'score': 0.02, 'label': 'blue'}]
    ```
    """

    default_task = "zero-shot-image-classification"

    def preprocess(
        self,
        image,
        candidate_labels=None,
        hypothesis_template="This is a photo of {}.",
        timeout=None,
        tokenizer_kwargs=None,
    ):
        inputs = self.processor(images=read_image(image, timeout), return_tensors="pt")
        inputs = inputs.to(self.dtype)
        texts = [hypothesis_template.format(label) for label in candidate_labels]
        options = {"padding": True, **(tokenizer_kwargs or {})}
        text_inputs = self.processor(text=texts, return_tensors="pt", **options)
        inputs["candidate_labels"] = candidate_labels
        inputs["text_inputs"] = [text_inputs]
        return inputs


__all__ = ["TripsZeroShotImageClassificationPipeline"]
