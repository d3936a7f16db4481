"""What clients may ask, and what the model is given for it: pairs of an image and a text."""

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, WithJsonSchema, create_model

from modeling_trips import TripsImageCache

from .errors import RequestError
from .settings import DEFAULT, Settings


# 16 x 16 pixels of teal: the least that a patch of that size fits into.
EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAGUlEQVR42mNkaGhgIAUwMZAIRjWMahg6GgBBvQEgL5Ky8wAAAABJRU5ErkJggg=="
)

# An upload is bytes, which JSON has not.
ImageSource = Annotated[
    str | bytes,
    WithJsonSchema(
        {
            "type": "string",
            "description": "JPEG, PNG, WebP, GIF or BMP: in JSON base64, a data URL, or a URL where the service "
            "allows it; in multipart/form-data a file.",
            "examples": [EXAMPLE_IMAGE],
        }
    ),
]


# Sentences for the errors of pydantic that say too little.
MESSAGES = {
    "string_pattern_mismatch": "The text must not be empty.",
    "extra_forbidden": "There is no such field.",
}
MAX_ERRORS = 100  # describing each error takes pydantic 10 microseconds


class ServiceRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Picture:
    """
    An image of a request.

    Args:
        key (`str`): hash of its bytes.
        pixel_values (`torch.Tensor` of shape `(1, num_channels, height, width)`, *optional*): as the model takes it.
        image_cache (`TripsImageCache`, *optional*): what was computed of it before, in place of `pixel_values`.
    """

    key: str
    pixel_values: torch.Tensor | None = None
    image_cache: TripsImageCache | None = None


@dataclass(frozen=True)
class Item:
    """
    What one result is computed from.

    Args:
        picture (`Picture`, *optional*)
        text (`str`, *optional*)
        tokens (`dict[str, list[int]]`, *optional*): the text, as the tokenizer reads it.
        schedule (`str`): name of the schedule, whose keep rate all items of a batch have in common.
        top_k (`int`): how many answers.
        place (`dict[str, int]`): which of the request's images and texts these are.
    """

    picture: Picture | None
    text: str | None
    tokens: dict[str, list[int]] | None
    schedule: str
    top_k: int
    place: dict[str, int]

    @property
    def request_class(self) -> Hashable:
        """Only items of one class go through the model together."""
        return self.schedule, self.top_k


def request_models(settings: Settings) -> dict[str, type[ServiceRequest]]:
    """What the body of a request to each endpoint must be."""
    text = Annotated[str, StringConstraints(max_length=settings.max_text_length)]
    question = Annotated[text, StringConstraints(pattern=r"\S")]
    names = (DEFAULT, *settings.schedules)
    schedule = (
        Literal[names],
        Field(DEFAULT, description="How many patches are kept: a name that the operator gave."),
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
            "top_k": (int, Field(1, ge=1, le=10, description="How many answers to each question, at most.")),
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
        RequestError: 400 if `body` is no JSON, 422 if it is not what `model` asks for.
    """
    try:
        return model.model_validate(body) if isinstance(body, dict) else model.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > MAX_ERRORS:
            raise RequestError(422, f"The body has {error.error_count()} errors, such as unknown fields.") from error
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise RequestError(400, f"The body is no JSON: {first['msg']}") from error
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
    Each image with each text, or, without `in_pairs`, each alone.

    Raises:
        RequestError: 422 if there is none.
    """
    if in_pairs:
        pairs = [(image, text) for image in range(len(pictures)) for text in range(len(tokens))]
    else:
        pairs = [(image, None) for image in range(len(pictures))] + [(None, text) for text in range(len(tokens))]
    if not pairs:
        raise RequestError(422, "There is no image and no text.")
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
