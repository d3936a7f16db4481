"""OpenAPI document of the service at `/docs.json`, which the page `/` shows."""

from copy import deepcopy
from http import HTTPStatus

from pydantic import BaseModel, Field

import modeling_trips

from .requests import ServiceRequest


REFERENCE = "#/components/schemas/{model}"
REFUSALS = {
    400: "The body is not valid JSON or not a valid form.",
    404: "The checkpoint does not support this endpoint.",
    408: "The body did not arrive in time.",
    413: "The body is too large, or an image has too many pixels.",
    415: "The body is neither JSON nor a form, or the format of an image is not supported.",
    422: "A field is missing or invalid, an image is broken or takes too long to decode, or a text is too long.",
    500: "The model failed on an image or a text.",
    503: "Too many requests are waiting. Try again after the seconds of Retry-After.",
}
HEALTH = {
    "/livez": "200 while the process runs.",
    "/readyz": "200 when the model is loaded.",
    "/metrics": "Counts and times for Prometheus.",
}


class Answer(BaseModel):
    answer: str
    score: float = Field(description="Its probability.")


class AnswerResponse(BaseModel):
    answers: list[list[Answer]] = Field(description="Answers to each question, best first.")


class CaptionResponse(BaseModel):
    captions: list[str] = Field(description="One for each prompt.")


class Score(BaseModel):
    image: int = Field(description="Index of the image in the request, from 0.")
    text: int = Field(description="Index of the text in the request, from 0.")
    score: float = Field(description="Probability that image and text match.")


class MatchResponse(BaseModel):
    scores: list[Score] = Field(description="Score of each image with each text.")


class Features(BaseModel):
    image: int | None = Field(None, description="Index of the image in the request, from 0.")
    text: int | None = Field(None, description="Index of the text in the request, from 0.")
    features: list[float] = Field(description="Vector of length 1. Dot products are similarities.")


class FeaturesResponse(BaseModel):
    features: list[Features]


class Refusal(BaseModel):
    error: str = Field(description="Error message with the remedy.")


RESPONSES = {
    "answer": (AnswerResponse, "Answer questions about an image"),
    "caption": (CaptionResponse, "Describe an image"),
    "match": (MatchResponse, "Match images with texts, to rerank candidates found by features"),
    "features": (FeaturesResponse, "Features of images and texts for comparison and indexing"),
}


def describe(requests: dict[str, type[ServiceRequest]]) -> dict:
    """Return the OpenAPI document of a service with these endpoints."""
    schemas: dict = {}
    paths = {f"/{name}": {"post": _operation(name, model, schemas)} for name, model in requests.items()}
    for path, text in HEALTH.items():
        plain = {"description": text, "content": {"text/plain": {"schema": {"type": "string"}}}}
        paths[path] = {"get": {"summary": text, "operationId": path.strip("/"), "responses": {"200": plain}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "TRIPS", "version": modeling_trips.__version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(name: str, request: type[ServiceRequest], schemas: dict) -> dict:
    response, summary = RESPONSES[name]
    body = _reference(request, schemas)
    example = {one: field.examples[0] for one, field in request.model_fields.items() if field.examples}
    if "image" in request.model_fields:
        example["image"] = schemas[request.__name__]["properties"]["image"]["examples"][0]
    refusal = {"application/json": {"schema": _reference(Refusal, schemas)}}
    refusals = {str(code): {"description": text, "content": refusal} for code, text in REFUSALS.items()}
    answer = {"application/json": {"schema": _reference(response, schemas)}}
    return {
        "operationId": name,
        "summary": summary,
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": body, "example": example},
                "multipart/form-data": {"schema": _form(schemas[request.__name__])},
            },
        },
        "responses": {"200": {"description": HTTPStatus.OK.phrase, "content": answer}, **refusals},
    }


def _form(schema: dict) -> dict:
    """Return the schema of a JSON body with files for its images."""
    schema = deepcopy(schema)
    for name in {"image", "images"} & schema["properties"].keys():
        image = schema["properties"][name]
        image = image.get("items", image)
        image.pop("examples")
        image |= {"format": "binary", "contentMediaType": "application/octet-stream"}
        schema["properties"][name].pop("examples", None)
    return schema


def _reference(model: type[BaseModel], schemas: dict) -> dict:
    """Add the model's schema to `schemas` and return a reference to it."""
    schema = model.model_json_schema(ref_template=REFERENCE)
    schemas |= schema.pop("$defs", {})
    schemas[model.__name__] = schema
    return {"$ref": REFERENCE.format(model=model.__name__)}
