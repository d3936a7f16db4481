"""Requests and replies of the service, and their OpenAPI description."""

import base64
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema
from pydantic.json_schema import SkipJsonSchema, models_json_schema

import modeling_trips
from modeling_trips.image_decoding_trips import FORMATS

from .settings import Settings


JSON = "application/json"
# 16 x 16 teal pixels.
EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAGUlEQVR42mNkaGhgIAUwMZAIRjWMahg6GgBBvQEgL5Ky8wAAAABJRU5ErkJggg=="
)


def read_base64(value: Any) -> Any:
    """Decode base64 or a data URL."""
    if not isinstance(value, str):
        return value
    if value.startswith("data:"):
        _, _, value = value.partition(",")
    return base64.b64decode(value, validate=True)


FILES = f"One of {', '.join(FORMATS)}."
IMAGE_SCHEMA = {"type": "string", "contentEncoding": "base64", "description": FILES, "examples": [EXAMPLE_IMAGE]}
ImageFile = Annotated[bytes, BeforeValidator(read_base64), WithJsonSchema(IMAGE_SCHEMA)]


def request_models(settings: Settings) -> dict[str, type[BaseModel]]:
    """Return the schema of the request body for each endpoint."""
    text = Annotated[str, StringConstraints(max_length=settings.max_text_length)]
    non_empty = Annotated[text, StringConstraints(strip_whitespace=True, min_length=1)]

    def several(kind: Any, least: int, most: int, description: str, example: str) -> Any:
        field = Field(description=description, examples=[[example]], min_length=least, max_length=most)
        return Annotated[list[kind], field]

    def text_list(kind: Any, least: int, description: str, example: str) -> Any:
        return several(kind, least, settings.max_texts, description, example)

    class Request(BaseModel):
        model_config = ConfigDict(extra="forbid")

    class SelectingRequest(Request):
        if settings.keep_rates:
            keep_rate: Literal[tuple(settings.keep_rates)] = Field(  # type: ignore
                None, description="Share of the patches to keep, in place of the model's."
            )

    class AnswerRequest(SelectingRequest):
        image: ImageFile
        questions: text_list(non_empty, 1, "Questions about the image.", "what color is the circle?")  # type: ignore
        top_k: int = Field(1, ge=1, le=10, description="Maximum number of answers to each question.")
        threshold: float = Field(0.0, ge=0.0, le=1.0, description="Score below which an answer is `unsure`.")
        kept_patches: bool = Field(False, description="Add the patches that each question keeps.")

    class CaptionRequest(SelectingRequest):
        image: ImageFile
        prompts: text_list(text, 1, "Beginnings of captions.", "a picture of") = [""]  # type: ignore

    class MatchRequest(SelectingRequest):
        images: several(ImageFile, 1, settings.max_images, FILES, EXAMPLE_IMAGE)  # type: ignore
        texts: text_list(non_empty, 1, "Texts to match with each image.", "a teal square")  # type: ignore

    class FeaturesRequest(Request):
        images: several(ImageFile, 0, settings.max_images, FILES, EXAMPLE_IMAGE) = []  # type: ignore
        texts: text_list(non_empty, 0, "Texts.", "a teal square") = []  # type: ignore

    return {"answer": AnswerRequest, "caption": CaptionRequest, "match": MatchRequest, "features": FeaturesRequest}


Box = tuple[float, float, float, float]  # (x0, y0, x1, y1) in pixels of the image


class Answer(BaseModel):
    answer: str
    score: float = Field(description="Probability.")
    unknown_words: list[str] | SkipJsonSchema[None] = Field(None, description="Words that no training question had.")
    kept_patches: list[Box] | SkipJsonSchema[None] = Field(None, description="Boxes, if the request asks for them.")


class Match(BaseModel):
    image: int
    text: int
    score: float = Field(description="Probability that the text fits the image.")


class Features(BaseModel):
    image: int | SkipJsonSchema[None] = None
    text: int | SkipJsonSchema[None] = None
    features: list[float] = Field(description="A vector of length 1.")


class AnswerReply(BaseModel):
    """Answer questions about an image."""

    answers: list[list[Answer]] = Field(description="A list for each question, the best answer first.")


class CaptionReply(BaseModel):
    """Describe an image."""

    captions: list[str] = Field(description="A caption for each prompt.")


class MatchReply(BaseModel):
    """Match images with texts, to rerank candidates found by features."""

    scores: list[Match] = Field(description="A score for each pair of image and text.")


class FeaturesReply(BaseModel):
    """Features of images and texts for comparison and indexing."""

    features: list[Features] = Field(description="Those of the images, then those of the texts.")


class ErrorReply(BaseModel):
    error: str


# By endpoint. A docstring says what the endpoint does; the reply has one field.
REPLIES: dict[str, type[BaseModel]] = {
    "answer": AnswerReply,
    "caption": CaptionReply,
    "match": MatchReply,
    "features": FeaturesReply,
}
REFUSED = (
    "400, 408, 413, 415 and 422: the request does not fit, and `error` says why. 503: overloaded, try again after the "
    "seconds in `Retry-After`. 500: the model failed."
)


def describe(title: str, requests: dict[str, type[BaseModel]]) -> dict:
    """Return the OpenAPI document of a service with these endpoints."""
    models = [ErrorReply, *requests.values(), *(REPLIES[name] for name in requests)]
    references, schemas = models_json_schema(
        [(model, "validation") for model in models],
        ref_template="#/components/schemas/{model}",
    )

    def content(model: type[BaseModel]) -> dict:
        return {JSON: {"schema": references[model, "validation"]}}

    paths = {}
    for name, request in requests.items():
        reply = REPLIES[name]
        operation = {
            "summary": reply.__doc__,
            "requestBody": {"required": True, "content": content(request)},
            "responses": {
                "200": {"description": "Results", "content": content(reply)},
                "default": {"description": REFUSED, "content": content(ErrorReply)},
            },
        }
        paths[f"/{name}"] = {"post": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": modeling_trips.__version__},
        "components": {"schemas": schemas["$defs"]},
        "paths": paths,
    }
