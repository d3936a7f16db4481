"""The handler of Inference Endpoints: its answers, and the requests that it refuses."""

import base64
import json

import pytest
from PIL import Image
from random_checkpoint import save_random_checkpoint
from strange_pictures import encoded

import modeling_trips
from modeling_trips.publishing import build_repository
from modeling_trips.publishing.handler import MAX_ANSWERS, MAX_TEXT_LENGTH, MAX_TEXTS, EndpointHandler


QA, WRITER, RETRIEVAL = HANDLED = (
    "TripsForQuestionAnswering",
    "TripsForConditionalGeneration",
    "TripsForRetrieval",
)
TEXTS = ["a teal picture", "a red one", "a picture of a red and teal shape"]
IMAGE = Image.new("RGB", (70, 50), "teal")


def in_base64(image, file_format="PNG"):
    return base64.b64encode(encoded(image, file_format)).decode()


INPUTS = {"image": in_base64(IMAGE), "question": TEXTS[0], "texts": TEXTS, "prompt": TEXTS[0]}


def build(tmp_path, name):
    folder = save_random_checkpoint(tmp_path / "checkpoint", getattr(modeling_trips, name), TEXTS)
    build_repository(tmp_path / "target", folder, "ada/finder", with_handler=True)
    return tmp_path / "target"


@pytest.fixture(scope="module")
def handlers(tmp_path_factory):
    return {name: EndpointHandler(str(build(tmp_path_factory.mktemp("handlers"), name))) for name in HANDLED}


def ask(handler, parameters=None, **inputs):
    return handler(json.loads(json.dumps({"inputs": {**INPUTS, **inputs}, "parameters": parameters})))


@pytest.mark.parametrize(
    "name, field, parameters",
    [
        (QA, "question", {}),
        (QA, "question", {"top_k": 2, "answers": ["red", "teal", "picture"]}),
        (QA, "question", {"max_new_tokens": 64, "num_beams": 3}),
        (WRITER, "prompt", {"max_new_tokens": 2, "num_beams": 2}),
    ],
)
def test_texts_are_those_of_the_pipeline(name, field, parameters, handlers):
    handler = handlers[name]
    assert ask(handler, parameters) == handler.pipeline(IMAGE, **{field: TEXTS[0]}, **parameters)


def test_scores_are_the_probabilities_that_texts_match(handlers):
    handler = handlers[RETRIEVAL]
    processor = handler.pipeline.processor
    inputs = processor(images=IMAGE, text=TEXTS, image_index=[0, 0, 0], return_tensors="pt")
    probabilities = handler.pipeline.model.match(**inputs).itm_logits.softmax(-1)
    assert ask(handler) == {"scores": probabilities[:, 1].tolist()}


@pytest.mark.parametrize(
    "name, parameters",
    [
        *((QA, {"num_beams": value}) for value in (0, 11, 10**30, True, "5")),
        (QA, {"max_new_tokens": 129}),
        *((QA, {"answers": value}) for value in ("red", ["red", 1], ["red"] * (MAX_ANSWERS + 1))),
        (QA, {"answers": ["red" * MAX_TEXT_LENGTH]}),
        (RETRIEVAL, {"top_k": 1}),
        (QA, ["parameters"]),  # no object
        # These run code.
        *((name, {"custom_generate": "folder", "trust_remote_code": True}) for name in HANDLED),
        *((name, {"generate_kwargs": {"custom_generate": "folder"}}) for name in HANDLED),
    ],
)
def test_unsupported_parameters_raise(name, parameters, handlers):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        ask(handlers[name], parameters)


@pytest.mark.parametrize(
    "name, field, value",
    [
        (QA, "question", ["red?"] * (MAX_TEXTS + 1)),
        (QA, "question", None),
        (WRITER, "prompt", ["a", "b"]),
        (RETRIEVAL, "texts", ["red"] * (MAX_TEXTS + 1)),
        (RETRIEVAL, "texts", []),
        (RETRIEVAL, "texts", [1]),
    ],
)
def test_texts_are_bounded(name, field, value, handlers):
    with pytest.raises(ValueError, match=f"inputs.{field}"):
        ask(handlers[name], **{field: value})


BAD_IMAGES = {
    "path": "/etc/passwd",
    "url": "http://127.0.0.1:1/a.png",
    "none": None,
    "PPM": in_base64(Image.new("RGB", (8, 8)), "PPM"),
    "pixels": in_base64(Image.new("1", (8000, 8000))),
}


@pytest.mark.parametrize("image", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_unsupported_images_raise(image, handlers):
    with pytest.raises(ValueError, match="image"):
        ask(handlers[QA], image=image)
