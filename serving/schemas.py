"""Requests and replies of the service, and their OpenAPI description."""

import base64
from http import HTTPStatus
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema, create_model
from pydantic.json_schema import models_json_schema

import modeling_trips

from .settings import DEFAULT, Settings


ERRORS = (400, 404, 408, 413, 415, 422, 500, 503)
JSON, FORM = "application/json", "multipart/form-data"
# 16 x 16 teal pixels.
EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAGUlEQVR42mNkaGhgIAUwMZAIRjWMahg6GgBBvQEgL5Ky8wAAAABJRU5ErkJggg=="
)


def read_base64(value: object) -> object:
    """Decode base64 or a data URL. Files of forms are bytes already."""
    try:
        if isinstance(value, str):
            return base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
        return value
    except ValueError as error:
        raise ValueError("An image must be base64 or a data URL") from error


IMAGE_SCHEMA = {
    "type": "string",
    "description": f"JPEG, PNG, WebP, GIF or BMP. In JSON: base64 or a data URL. In {FORM}: a file.",
    "examples": [EXAMPLE_IMAGE],
}
ImageFile = Annotated[bytes, BeforeValidator(read_base64), WithJsonSchema(IMAGE_SCHEMA)]


def request_models(settings: Settings) -> dict[str, type[BaseModel]]:
    """Return the schema of the request body for each endpoint."""
    text = Annotated[str, StringConstraints(max_length=settings.max_text_length)]
    non_empty = Annotated[text, StringConstraints(strip_whitespace=True, min_length=1)]
    schedule_name = Literal[(DEFAULT, *settings.schedules)]  # type: ignore[valid-type]
    num_texts, num_images = {"max_length": settings.max_texts}, {"max_length": settings.max_images}

    class Request(BaseModel):
        model_config = ConfigDict(extra="forbid")
        schedule: schedule_name = Field(DEFAULT, description="Name of the selection schedule.")

    class AnswerRequest(Request):
        image: ImageFile
        questions: list[non_empty] = Field(min_length=1, examples=[["what color is the circle?"]], **num_texts)
        top_k: int = Field(1, ge=1, le=10, description="Maximum number of answers to each question.")

    class CaptionRequest(Request):
        image: ImageFile
        prompts: list[text] = Field([""], min_length=1, examples=[["a picture of"]], **num_texts)

    class MatchRequest(Request):
        images: list[ImageFile] = Field(min_length=1, examples=[[EXAMPLE_IMAGE]], **num_images)
        texts: list[non_empty] = Field(min_length=1, examples=[["a teal square", "a red circle"]], **num_texts)

    class FeaturesRequest(Request):
        images: list[ImageFile] = Field([], examples=[[EXAMPLE_IMAGE]], **num_images)
        texts: list[non_empty] = Field([], examples=[["a teal square"]], **num_texts)

    return {"answer": AnswerRequest, "caption": CaptionRequest, "match": MatchRequest, "features": FeaturesRequest}


Index = Annotated[int, Field(description="Position in the request, from 0.")]


class Answer(BaseModel):
    answer: str
    score: float = Field(description="Probability.")


class Score(BaseModel):
    image: Index
    text: Index
    score: float = Field(description="Probability.")


class Features(BaseModel):
    image: Index | None = None
    text: Index | None = None
    features: list[float] = Field(description="Vector of length 1. Dot products are similarities.")


# Summary of each endpoint, and its reply: one field with a list.
REPLIES = {
    "answer": ("Answer questions about an image", "answers", list[list[Answer]]),
    "caption": ("Describe an image", "captions", list[str]),
    "match": ("Match images with texts, to rerank candidates found by features", "scores", list[Score]),
    "features": ("Features of images and texts for comparison and indexing", "features", list[Features]),
}


def describe(title: str, requests: dict[str, type[BaseModel]]) -> dict:
    """Return the OpenAPI document of a service with these endpoints."""
    error = create_model("ErrorReply", error=str)
    replies = {
        name: create_model(f"{name.capitalize()}Reply", **{REPLIES[name][1]: REPLIES[name][2]}) for name in requests
    }
    models = [(model, "validation") for model in (error, *requests.values(), *replies.values())]
    references, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")

    def content(model: type[BaseModel], *kinds: str) -> dict:
        return {"content": {kind: {"schema": references[model, "validation"]} for kind in kinds}}

    refusals = {str(code): {"description": HTTPStatus(code).phrase, **content(error, JSON)} for code in ERRORS}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": modeling_trips.__version__},
        "components": {"schemas": schemas["$defs"]},
        "paths": {
            f"/{name}": {
                "post": {
                    "operationId": name,
                    "summary": REPLIES[name][0],
                    "requestBody": {"required": True, **content(request, JSON, FORM)},
                    "responses": {"200": {"description": "OK", **content(replies[name], JSON)}, **refusals},
                }
            }
            for name, request in requests.items()
        },
    }
