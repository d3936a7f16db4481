"""
What Inference Endpoints run of this repository: it answers questions about an image, describes it, or tells how well
texts match it, as the checkpoint can. It needs what the checkpoint needs, and nothing of the project.

    {"inputs": {"image": "<base64>", "question": "what color is it?"}, "parameters": {"top_k": 2}}
    {"inputs": {"image": "<base64>", "prompt": "a picture of"}}
    {"inputs": {"image": "<base64>", "texts": ["a teal square", "a red circle"]}}
"""

import base64
import io

import PIL.Image
import torch
from transformers import AutoConfig, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline


class EndpointHandler:
    """
    Args:
        path (`str`): the folder of the repository.
    """

    def __init__(self, path: str = ""):
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.answer = {
            "TripsForQuestionAnswering": self.answer_question,
            "TripsForConditionalGeneration": self.describe,
            "TripsForRetrieval": self.match,
        }[config.architectures[0]]
        if self.answer == self.match:
            model = AutoModelForZeroShotImageClassification.from_pretrained(path, trust_remote_code=True)
            self.model = model.to(self.device).eval()
            self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        else:
            (task,) = config.custom_pipelines
            self.pipeline = pipeline(task, model=path, trust_remote_code=True, device=self.device)

    def __call__(self, data: dict) -> list | dict:
        """
        Args:
            data (`dict`): `inputs`, as above, and `parameters` for the pipeline.

        Raises:
            ValueError: if something is missing, or the image is none: the endpoint's client reads why.
        """
        inputs, parameters = data.get("inputs"), data.get("parameters") or {}
        if not isinstance(inputs, dict) or "image" not in inputs:
            raise ValueError("`inputs` must be an object with an `image`.")
        return self.answer(_read_image(inputs["image"]), inputs, **parameters)

    def answer_question(self, image: PIL.Image.Image, inputs: dict, **parameters) -> list:
        if "question" not in inputs:
            raise ValueError("`inputs` must have a `question`, or a list of them.")
        return self.pipeline(image=image, question=inputs["question"], **parameters)

    def describe(self, image: PIL.Image.Image, inputs: dict, **parameters) -> list:
        return self.pipeline(image, prompt=inputs.get("prompt", ""), **parameters)

    @torch.inference_mode()
    def match(self, image: PIL.Image.Image, inputs: dict) -> dict:
        texts = inputs.get("texts")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("`inputs` must have `texts`, a list of at least one.")
        batch = self.processor(images=image, text=texts, image_index=[0] * len(texts), return_tensors="pt")
        logits = self.model.match(**batch.to(self.device)).itm_logits
        return {"scores": logits.softmax(-1)[:, 1].tolist()}


def _read_image(image) -> PIL.Image.Image:
    """Of base64: paths and URLs of strangers are not opened. The endpoint itself makes pictures of bodies that are."""
    if isinstance(image, PIL.Image.Image):
        return image
    try:
        picture = PIL.Image.open(io.BytesIO(base64.b64decode(image, validate=True)))
        picture.load()
        return picture
    except Exception as error:  # Pillow raises many kinds
        raise ValueError("`image` must be a picture in base64.") from error
