"""Requests and replies of the service, and their OpenAPI description."""

import base64
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema, create_model
from pydantic.json_schema import models_json_schema

import modeling_trips

from .settings import DEFAULT, Settings


JSON = "application/json"
# 16 x 16 teal pixels.
EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAGUlEQVR42mNkaGhgIAUwMZAIRjWMahg6GgBBvQEgL5Ky8wAAAABJRU5ErkJggg=="
)


def read_base64(value: object) -> object:
    """Decode base64 or a data URL."""
    if isinstance(value, str):
        return base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
    return value


FILES = "JPEG, PNG, WebP, GIF or BMP."
IMAGE_SCHEMA = {"type": "string", "contentEncoding": "base64", "description": FILES, "examples": [EXAMPLE_IMAGE]}
ImageFile = Annotated[bytes, BeforeValidator(read_base64), WithJsonSchema(IMAGE_SCHEMA)]


def request_models(settings: Settings) -> dict[str, type[BaseModel]]:
    """Return the schema of the request body for each endpoint."""
    text = Annotated[str, StringConstraints(max_length=settings.max_text_length)]
    non_empty = Annotated[text, StringConstraints(strip_whitespace=True, min_length=1)]
    schedule_name = Literal[(DEFAULT, *settings.schedules)]  # type: ignore[valid-type]

    def text_list(kind: Any, least: int, description: str, example: str) -> Any:
        limits = {"min_length": least, "max_length": settings.max_texts}
        return Annotated[list[kind], Field(description=description, examples=[[example]], **limits)]

    def image_list(least: int) -> Any:
        limits = {"min_length": least, "max_length": settings.max_images}
        return Annotated[list[ImageFile], Field(description=FILES, examples=[[EXAMPLE_IMAGE]], **limits)]

    class Request(BaseModel):
        model_config = ConfigDict(extra="forbid")
        schedule: schedule_name = Field(DEFAULT, description="Name of the selection schedule.")

    class AnswerRequest(Request):
        image: ImageFile
        questions: text_list(non_empty, 1, "Questions about the image.", "what color is the circle?")  # type: ignore
        top_k: int = Field(1, ge=1, le=10, description="Maximum number of answers to each question.")
        kept_patches: bool = Field(False, description="Add the patches that each question keeps.")

    class CaptionRequest(Request):
        image: ImageFile
        prompts: text_list(text, 1, "Beginnings of captions.", "a picture of") = [""]  # type: ignore

    class MatchRequest(Request):
        images: image_list(1)  # type: ignore
        texts: text_list(non_empty, 1, "Texts to match with each image.", "a teal square")  # type: ignore

    class FeaturesRequest(Request):
        images: image_list(0) = []  # type: ignore
        texts: text_list(non_empty, 0, "Texts.", "a teal square") = []  # type: ignore

    return {"answer": AnswerRequest, "caption": CaptionRequest, "match": MatchRequest, "features": FeaturesRequest}


Index = Annotated[int, Field(description="Position in the request, from 0.")]


class Answer(BaseModel):
    answer: str
    score: float = Field(description="Probability.")
    kept_patches: list[tuple[float, float, float, float]] | None = Field(
        None, description="Of the best answer, if asked for: boxes (x0, y0, x1, y1) in pixels of the image."
    )


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
    replies = {
        name: create_model(f"{name.capitalize()}Reply", **{REPLIES[name][1]: REPLIES[name][2]}) for name in requests
    }
    error = create_model("ErrorReply", error=str)
    models = [(model, "validation") for model in (error, *requests.values(), *replies.values())]
    references, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")

    def body(model: type[BaseModel], description: str) -> dict:
        return {"description": description, "content": {JSON: {"schema": references[model, "validation"]}}}

    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": modeling_trips.__version__},
        "components": {"schemas": schemas["$defs"]},
        "paths": {
            f"/{name}": {
                "post": {
                    "operationId": name,
                    "summary": REPLIES[name][0],
                    "requestBody": {"required": True, **body(request, "One request")},
                    "responses": {"200": body(replies[name], "OK"), "default": body(error, "Refused or failed")},
                }
            }
            for name, request in requests.items()
        },
    }
