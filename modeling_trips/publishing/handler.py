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
import binascii

import PIL.Image
import torch
from transformers import AutoConfig, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module


MAX_TEXTS = 32
MAX_TEXT_LENGTH = 2000  # characters
MAX_ANSWERS = 4096
MAX_IMAGE_BYTES = 8 << 20  # `decode_image` also limits the pixels
# Maxima of numbers in `parameters`. The decoder's positions also limit `max_new_tokens`.
MAX_NUMBERS = {"top_k": 10, "num_beams": 10, "max_new_tokens": 128}


class EndpointHandler:
    """
    Args:
        path (`str`): Folder of the repository.
    """

    def __init__(self, path: str = ""):
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        self.decode_image = get_class_from_dynamic_module("image_decoding_trips.decode_image", path)
        self.why_slow = get_class_from_dynamic_module("slow_files.why_slow", path)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.answer, self.accepted = {
            "TripsForQuestionAnswering": (self.answer_question, ("top_k", "answers", "max_new_tokens", "num_beams")),
            "TripsForConditionalGeneration": (self.describe, ("max_new_tokens", "num_beams")),
            "TripsForRetrieval": (self.match, ()),
        }[config.architectures[0]]
        self.max_numbers = MAX_NUMBERS | {
            "max_new_tokens": min(MAX_NUMBERS["max_new_tokens"], config.decoder_config.max_position_embeddings)
        }
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
            data (`dict`): `inputs`, as above, and optionally the `parameters` that the checkpoint supports: `top_k` (1
                to 10), `answers` (a list of candidate texts), `max_new_tokens` and `num_beams` (1 to 10).

        Raises:
            ValueError: An input or a parameter is missing, unknown, of another type or out of bounds, or the image
                cannot be decoded. The client sees the message.
        """
        inputs, parameters = data.get("inputs"), data.get("parameters")
        if not isinstance(inputs, dict) or "image" not in inputs:
            raise ValueError("`inputs` must be an object with an `image`.")
        parameters = self.check_parameters({} if parameters is None else parameters)
        return self.answer(self.read_image(inputs["image"]), inputs, **parameters)

    def check_parameters(self, parameters: dict) -> dict:
        """Return `parameters` after checking their names and values."""
        if not isinstance(parameters, dict):
            raise ValueError(f"`parameters` must be an object, got a {type(parameters).__name__}.")
        for name, value in parameters.items():
            if name not in self.accepted:
                accepted = ", ".join(f"`{one}`" for one in self.accepted) or "none"
                raise ValueError(f"`parameters` has an unknown entry {name!r:.100}. Accepted: {accepted}.")
            if name == "answers":
                _check_texts("parameters.answers", value, MAX_ANSWERS)
            elif type(value) is not int or not 1 <= value <= self.max_numbers[name]:
                raise ValueError(
                    f"`parameters.{name}` must be an integer from 1 to {self.max_numbers[name]}, got {value!r:.100}."
                )
        return parameters

    def read_image(self, image: str | PIL.Image.Image) -> PIL.Image.Image:
        """Decode base64. Paths and URLs are not opened. Endpoints decode image bodies themselves."""
        if isinstance(image, PIL.Image.Image):
            return image
        if not isinstance(image, str):
            raise ValueError(f"`inputs.image` must be an image file in base64, got a {type(image).__name__}.")
        if len(image) > MAX_IMAGE_BYTES // 3 * 4 + 4:
            raise ValueError(f"`inputs.image` must have at most {MAX_IMAGE_BYTES:,} bytes.")
        try:
            content = base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError("`inputs.image` must be an image file in base64.") from error
        if message := self.why_slow(content):
            raise ValueError(f"`inputs.image`: {message}")
        return self.decode_image(content)

    def answer_question(self, image: PIL.Image.Image, inputs: dict, **parameters) -> list:
        question = inputs.get("question")
        _check_texts("inputs.question", [question] if isinstance(question, str) else question, MAX_TEXTS)
        return self.pipeline(image=image, question=question, **parameters)

    def describe(self, image: PIL.Image.Image, inputs: dict, **parameters) -> list:
        prompt = inputs.get("prompt", "")
        _check_texts("inputs.prompt", [prompt], 1)
        return self.pipeline(image, prompt=prompt, **parameters)

    @torch.inference_mode()
    def match(self, image: PIL.Image.Image, inputs: dict) -> dict:
        texts = inputs.get("texts")
        _check_texts("inputs.texts", texts, MAX_TEXTS)
        batch = self.processor(images=image, text=texts, image_index=[0] * len(texts), return_tensors="pt")
        logits = self.model.match(**batch.to(self.device)).itm_logits
        return {"scores": logits.softmax(-1)[:, 1].tolist()}


def _check_texts(name: str, texts: list, most: int):
    is_list = isinstance(texts, list) and 1 <= len(texts) <= most
    if not is_list or not all(isinstance(text, str) and len(text) <= MAX_TEXT_LENGTH for text in texts):
        expected = "one string" if most == 1 else f"1 to {most:,} strings"
        raise ValueError(f"`{name}` must be {expected} of at most {MAX_TEXT_LENGTH:,} characters.")
