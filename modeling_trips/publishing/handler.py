"""
Handler of Inference Endpoints for this repository. Depending on the checkpoint it answers questions about an image,
captions it, or scores how well texts match it. It needs only the packages of the checkpoint.

    {"inputs": {"image": "<base64>", "question": "what color is it?"}, "parameters": {"top_k": 2}}
    {"inputs": {"image": "<base64>", "prompt": "a picture of"}}
    {"inputs": {"image": "<base64>", "texts": ["a teal square", "a red circle"]}}

Clients are not trusted. `EndpointHandler.__call__` lists the accepted `parameters` and their bounds, because other
options of `generate` can load code (`custom_generate`) or take unlimited time.
"""

import base64
from typing import Any

import torch
from transformers import AutoConfig, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module


MAX_TEXTS = 32
MAX_TEXT_LENGTH = 2000  # characters
MAX_ANSWERS = 4096
MAX_NUMBERS = {"top_k": 10, "num_beams": 10, "max_new_tokens": 128}  # in `parameters`
# Field of the texts, and accepted parameters.
HEADS = {
    "TripsForQuestionAnswering": ("question", ("top_k", "answers", "max_new_tokens", "num_beams")),
    "TripsForConditionalGeneration": ("prompt", ("max_new_tokens", "num_beams")),
    "TripsForRetrieval": ("texts", ()),
}


class EndpointHandler:
    """Handler of the repository in the folder `path`."""

    def __init__(self, path: str = ""):
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        self.decode_image = get_class_from_dynamic_module("image_decoding_trips.decode_image", path)
        self.why_slow = get_class_from_dynamic_module("slow_files.why_slow", path)
        self.field, self.accepted = HEADS[config.architectures[0]]
        (task,) = config.custom_pipelines
        self.pipeline = pipeline(task, model=path, trust_remote_code=True)  # on a GPU if there is one

    def __call__(self, data: dict) -> list | dict:
        """
        Answer a request: `inputs`, as above, and optionally the `parameters` that the checkpoint supports: `top_k` (1
        to 10), `answers` (a list of candidate texts), `max_new_tokens` (1 to 128) and `num_beams` (1 to 10).

        Raises:
            ValueError: An input or a parameter is missing, unknown, of another type or out of bounds, or the image
                cannot be decoded. The client sees the message.
        """
        inputs = data.get("inputs")
        parameters = data.get("parameters") or {}
        if not isinstance(inputs, dict) or not isinstance(parameters, dict):
            raise ValueError("`inputs` and `parameters` must be objects.")
        for name, value in parameters.items():
            if name not in self.accepted:
                raise ValueError(f"`parameters` has an unknown entry {name!r:.100}. Accepted: {self.accepted}.")
            if name == "answers":
                check_texts("parameters.answers", value, MAX_ANSWERS)
            elif type(value) is not int or not 1 <= value <= MAX_NUMBERS[name]:
                raise ValueError(f"`parameters.{name}` must be an integer from 1 to {MAX_NUMBERS[name]}.")
        given = inputs.get(self.field, "" if self.field == "prompt" else None)
        texts = given if isinstance(given, list) and self.field != "prompt" else [given]
        check_texts(f"inputs.{self.field}", texts, MAX_TEXTS)
        image = self.read_image(inputs.get("image"))
        if self.field != "texts":
            return self.pipeline(image, **{self.field: given}, **parameters)
        model = self.pipeline.model
        image_index = [0] * len(texts)
        batch = self.pipeline.processor(images=image, text=texts, image_index=image_index, return_tensors="pt")
        with torch.inference_mode():
            logits = model.match(**batch.to(model.device)).itm_logits  # (num_texts, 2)
        return {"scores": logits.softmax(-1)[:, 1].tolist()}

    def read_image(self, image: Any):
        """Decode base64. Paths and URLs are not opened."""
        try:
            content = base64.b64decode(image, validate=True)
        except (TypeError, ValueError) as error:
            raise ValueError("`inputs.image` must be an image file in base64.") from error
        if message := self.why_slow(content):
            raise ValueError(f"`inputs.image`: {message}")
        return self.decode_image(content)


def check_texts(name: str, texts: Any, most: int):
    is_list = isinstance(texts, list) and 1 <= len(texts) <= most
    if not is_list or not all(isinstance(text, str) and len(text) <= MAX_TEXT_LENGTH for text in texts):
        raise ValueError(f"`{name}` must be 1 to {most:,} strings of at most {MAX_TEXT_LENGTH:,} characters.")
