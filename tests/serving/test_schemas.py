"""The OpenAPI description of the service."""

import pytest


pytest.importorskip("granian")

from trips_serving.schemas import REPLIES, describe, request_models  # noqa: E402
from trips_serving.settings import Settings  # noqa: E402


@pytest.fixture(scope="module")
def document():
    return describe("a model", request_models(Settings(model="a model")))


def fields_of(document, schema):
    name = schema["$ref"].removeprefix("#/components/schemas/")
    return document["components"]["schemas"][name]["properties"]


def content_of(document, message):
    return fields_of(document, message["content"]["application/json"]["schema"])


@pytest.mark.parametrize("name", REPLIES)
def test_requests_and_replies_have_types(document, name):
    operation = document["paths"][f"/{name}"]["post"]
    assert content_of(document, operation["requestBody"])
    reply = content_of(document, operation["responses"]["200"])
    (field,) = REPLIES[name].model_fields
    assert list(reply) == [field]
    assert reply[field]["type"] == "array"
    error = content_of(document, operation["responses"]["default"])
    assert error["error"]["type"] == "string"


def test_the_reply_of_an_answer_has_typed_fields(document):
    schema = document["components"]["schemas"]["AnswerReply"]["properties"]["answers"]
    answer = fields_of(document, schema["items"]["items"])
    assert {name: field["type"] for name, field in answer.items()} == {
        "answer": "string",
        "score": "number",
        "kept_patches": "array",
        "unknown_words": "array",
    }


def test_a_keep_rate_is_one_of_the_operator_s():
    assert "keep_rate" not in request_models(Settings(model="a model"))["answer"].model_fields
    model = request_models(Settings(model="a model", keep_rates="0.25,1"))["caption"]
    assert model(image="", keep_rate=0.25).keep_rate == 0.25
    assert model(image="").keep_rate is None
    for rate in (0.5, "all", float("nan")):
        with pytest.raises(ValueError, match="keep_rate"):
            model(image="", keep_rate=rate)
    assert model.model_json_schema()["properties"]["keep_rate"]["enum"] == [0.25, 1.0]
