"""Schemas of requests, and the items (pairs of an image and a text) that the model gets."""

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, WithJsonSchema, create_model

from modeling_trips import TripsImageCache

from .errors import RequestError
from .settings import DEFAULT, Settings


# 16 x 16 teal pixels.
EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAGUlEQVR42mNkaGhgIAUwMZAIRjWMahg6GgBBvQEgL5Ky8wAAAABJRU5ErkJggg=="
)

# Uploads are bytes, which JSON does not have.
ImageSource = Annotated[
    str | bytes,
    WithJsonSchema(
        {
            "type": "string",
            "description": "JPEG, PNG, WebP, GIF or BMP. In JSON: base64, a data URL, or a URL if the service allows "
            "it. In multipart/form-data: a file.",
            "examples": [EXAMPLE_IMAGE],
        }
    ),
]


# Messages that replace those of pydantic.
MESSAGES = {
    "string_pattern_mismatch": "The text must not be empty.",
    "extra_forbidden": "The field is unknown.",
}
MAX_ERRORS = 100  # pydantic needs 10 microseconds per error


class ServiceRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Picture:
    """
    Image of a request.

    Args:
        key (`str`): Hash of its bytes.
        pixel_values (`torch.Tensor` of shape `(1, num_channels, height, width)`, *optional*): Preprocessed image.
        image_cache (`TripsImageCache`, *optional*): Cached image states instead of `pixel_values`.
    """

    key: str
    pixel_values: torch.Tensor | None = None
    image_cache: TripsImageCache | None = None


@dataclass(frozen=True)
class Item:
    """
    Input of one result.

    Args:
        picture (`Picture`, *optional*): Image.
        text (`str`, *optional*): Text.
        tokens (`dict[str, list[int]]`, *optional*): Outputs of the tokenizer for the text.
        schedule (`str`): Name of the schedule, equal for all items of a batch.
        top_k (`int`): Number of answers.
        place (`dict[str, int]`): Indices of the image and the text in the request.
    """

    picture: Picture | None
    text: str | None
    tokens: dict[str, list[int]] | None
    schedule: str
    top_k: int
    place: dict[str, int]

    @property
    def request_class(self) -> Hashable:
        """Key that is equal for items that can share a batch."""
        return self.schedule, self.top_k


def request_models(settings: Settings) -> dict[str, type[ServiceRequest]]:
    """Make the schema of the request body for each endpoint."""
    text = Annotated[str, StringConstraints(max_length=settings.max_text_length)]
    question = Annotated[text, StringConstraints(pattern=r"\S")]
    names = (DEFAULT, *settings.schedules)
    schedule = (
        Literal[names],
        Field(DEFAULT, description="Name of the selection schedule."),
    )
    image = (ImageSource, Field())

    def texts(kind, least: int, **options):
        return list[kind], Field(min_length=least, max_length=settings.max_texts, **options)

    def images(least: int, **options):
        return list[ImageSource], Field(min_length=least, max_length=settings.max_images, **options)

    fields = {
        "answer": {
            "image": image,
            "questions": texts(question, 1, examples=[["what color is the shape?", "is there a circle?"]]),
            "top_k": (int, Field(1, ge=1, le=10, description="Maximum number of answers to each question.")),
        },
        "caption": {"image": image, "prompts": texts(text, 1, default=[""], examples=[["a picture of"]])},
        "match": {
            "images": images(1, examples=[[EXAMPLE_IMAGE]]),
            "texts": texts(question, 1, examples=[["a teal square", "a red circle"]]),
        },
        "features": {
            "images": images(0, default=[], examples=[[EXAMPLE_IMAGE]]),
            "texts": texts(question, 0, default=[], examples=[["a teal square"]]),
        },
    }
    return {
        name: create_model(f"{name.capitalize()}Request", __base__=ServiceRequest, **own, schedule=schedule)
        for name, own in fields.items()
    }


def validate(model: type[ServiceRequest], body: bytes | dict) -> ServiceRequest:
    """
    Raises:
        RequestError: 400 if `body` is not valid JSON, 422 if it does not fit `model`.
    """
    try:
        return model.model_validate(body) if isinstance(body, dict) else model.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > MAX_ERRORS:
            raise RequestError(422, f"The body has {error.error_count()} errors. See /docs.json.") from error
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise RequestError(400, f"The body is not valid JSON: {first['msg']}") from error
        place = ".".join(map(str, first["loc"])) or "the body"
        raise RequestError(422, f"{place}: {MESSAGES.get(first['type'], first['msg'])}") from error


def images_of(request: ServiceRequest) -> list[str | bytes]:
    return request.images if hasattr(request, "images") else [request.image]


def texts_of(request: ServiceRequest) -> list[str]:
    return next(getattr(request, name) for name in ("questions", "prompts", "texts") if hasattr(request, name))


def key_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def items_of(request: ServiceRequest, pictures: list[Picture], tokens: list[dict], in_pairs: bool) -> list[Item]:
    """
    Return an item for each pair of image and text, or, without `in_pairs`, for each image and each text.

    Raises:
        RequestError: 422 without any image or text.
    """
    if in_pairs:
        pairs = [(image, text) for image in range(len(pictures)) for text in range(len(tokens))]
    else:
        pairs = [(image, None) for image in range(len(pictures))] + [(None, text) for text in range(len(tokens))]
    if not pairs:
        raise RequestError(422, "The request must have an image or a text.")
    return [
        Item(
            picture=None if image is None else pictures[image],
            text=None if text is None else texts_of(request)[text],
            tokens=None if text is None else tokens[text],
            schedule=request.schedule,
            top_k=getattr(request, "top_k", 1),
            place={name: index for name, index in (("image", image), ("text", text)) if index is not None},
        )
        for image, text in pairs
    ]
