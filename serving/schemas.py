"""Requests and replies of the service, and their OpenAPI description."""

import base64
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema
from pydantic.json_schema import models_json_schema

import modeling_trips

from .settings import Settings


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

    def text_list(kind: Any, least: int, description: str, example: str) -> Any:
        limits = {"min_length": least, "max_length": settings.max_texts}
        return Annotated[list[kind], Field(description=description, examples=[[example]], **limits)]

    def image_list(least: int) -> Any:
        limits = {"min_length": least, "max_length": settings.max_images}
        return Annotated[list[ImageFile], Field(description=FILES, examples=[[EXAMPLE_IMAGE]], **limits)]

    class Request(BaseModel):
        model_config = ConfigDict(extra="forbid")

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


# Summary of each endpoint, and the field of its reply.
REPLIES = {
    "answer": ("Answer questions about an image", "answers"),
    "caption": ("Describe an image", "captions"),
    "match": ("Match images with texts, to rerank candidates found by features", "scores"),
    "features": ("Features of images and texts for comparison and indexing", "features"),
}


def describe(title: str, requests: dict[str, type[BaseModel]]) -> dict:
    """Return the OpenAPI document of a service with these endpoints."""
    models = [(model, "validation") for model in requests.values()]
    references, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")
    content = {name: {JSON: {"schema": references[model, "validation"]}} for name, model in requests.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": modeling_trips.__version__},
        "components": {"schemas": schemas["$defs"]},
        "paths": {
            f"/{name}": {
                "post": {
                    "operationId": name,
                    "summary": summary,
                    "requestBody": {"required": True, "content": content[name]},
                    "responses": {"200": reply(f"Results: {field}"), "default": reply("Refused or failed: error")},
                }
            }
            for name, (summary, field) in REPLIES.items()
            if name in requests
        },
    }


def reply(description: str) -> dict:
    return {"description": description, "content": {JSON: {}}}
