"""Requests and replies of the service, and their OpenAPI description."""

import base64
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

import modeling_trips

from .settings import DEFAULT, Settings


JSON = "application/json"
# 16 x 16 teal pixels.
EXAMPLE_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAGUlEQVR42mNkaGhgIAUwMZAIRjWMahg6GgBBvQEgL5Ky8wAAAABJRU5ErkJggg=="
)


def read_base64(value: object) -> object:
    """Decode base64 or a data URL."""
    try:
        return base64.b64decode(value.rpartition(",")[2], validate=True)  # type: ignore[attr-defined]
    except (AttributeError, ValueError) as error:
        raise ValueError("An image must be base64 or a data URL") from error


FILES = "JPEG, PNG, WebP, GIF or BMP."
IMAGE_SCHEMA = {"type": "string", "contentEncoding": "base64", "description": FILES, "examples": [EXAMPLE_IMAGE]}
ImageFile = Annotated[bytes, BeforeValidator(read_base64), WithJsonSchema(IMAGE_SCHEMA)]


def request_models(settings: Settings) -> dict[str, type[BaseModel]]:
    """Return the schema of the request body for each endpoint."""
    text = Annotated[str, StringConstraints(max_length=settings.max_text_length)]
    non_empty = Annotated[text, StringConstraints(strip_whitespace=True, min_length=1)]
    text_list: dict[str, Any] = {"max_length": settings.max_texts}
    image_list: dict[str, Any] = {
        "max_length": settings.max_images,
        "description": FILES,
        "examples": [[EXAMPLE_IMAGE]],
    }

    class Request(BaseModel):
        model_config = ConfigDict(extra="forbid")
        schedule: Literal[(DEFAULT, *settings.schedules)] = Field(  # type: ignore[valid-type]
            DEFAULT, description="Name of the selection schedule."
        )

    class AnswerRequest(Request):
        image: ImageFile
        questions: list[non_empty] = Field(
            min_length=1,
            description="Questions about the image.",
            examples=[["what color is the circle?"]],
            **text_list,
        )
        top_k: int = Field(1, ge=1, le=10, description="Maximum number of answers to each question.")
        kept_patches: bool = Field(False, description="Add the patches that each question keeps.")

    class CaptionRequest(Request):
        image: ImageFile
        prompts: list[text] = Field(
            [""], min_length=1, description="Beginnings of captions.", examples=[["a picture of"]], **text_list
        )

    class MatchRequest(Request):
        images: list[ImageFile] = Field(min_length=1, **image_list)
        texts: list[non_empty] = Field(
            min_length=1, description="Texts to match with each image.", examples=[["a teal square"]], **text_list
        )

    class FeaturesRequest(Request):
        images: list[ImageFile] = Field([], **image_list)
        texts: list[non_empty] = Field([], description="Texts.", examples=[["a teal square"]], **text_list)

    return {"answer": AnswerRequest, "caption": CaptionRequest, "match": MatchRequest, "features": FeaturesRequest}


# Summary of each endpoint, the field of its reply with the list of results, and a result.
REPLIES = {
    "answer": ("Answer questions about an image", "answers", '[{"answer", "score"}, ...]'),
    "caption": ("Describe an image", "captions", "text"),
    "match": (
        "Match images with texts, to rerank candidates found by features",
        "scores",
        '{"image", "text", "score"}',
    ),
    "features": ("Features for comparison and indexing", "features", '{"image" or "text", "features"}'),
}


def describe(title: str, requests: dict[str, type[BaseModel]]) -> dict:
    """Return the OpenAPI document of a service with these endpoints."""

    def describe_endpoint(name: str, request: type[BaseModel]) -> dict:
        summary, field, result = REPLIES[name]
        return {
            "summary": summary,
            "requestBody": {"required": True, "content": {JSON: {"schema": request.model_json_schema()}}},
            "responses": {
                "200": {"description": f'{{"{field}": [{result}, ...]}}', "content": {JSON: {}}},
                "default": {"description": '{"error": message}', "content": {JSON: {}}},
            },
        }

    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": modeling_trips.__version__},
        "paths": {f"/{name}": {"post": describe_endpoint(name, request)} for name, request in requests.items()},
    }
