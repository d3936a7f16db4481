"""Files for the Hub's services: evaluation results, and the handler of Inference Endpoints."""

import base64
import io
import json
import subprocess
from pathlib import Path

import PIL.Image
import pytest
import yaml
from clean_environment import make_environment
from huggingface_hub import parse_eval_result_entries
from random_checkpoint import save_random_checkpoint

import modeling_trips
from modeling_trips import (
    TripsForRetrieval,
    TripsForVisualGrounding,
    TripsProcessor,
    TripsVisualQuestionAnsweringPipeline,
)
from modeling_trips.publishing import CardArguments, build_repository
from modeling_trips.publishing.handler import MAX_ANSWERS, MAX_IMAGE_BYTES, MAX_TEXT_LENGTH, MAX_TEXTS, EndpointHandler
from modeling_trips.publishing.model_card import read_metrics
from modeling_trips.publishing.repository import results_of


HANDLED = ("TripsForQuestionAnswering", "TripsForConditionalGeneration", "TripsForRetrieval")
TEXTS = ["a teal picture", "a red one", "a picture of a red and teal shape"]
IMAGE = PIL.Image.new("RGB", (70, 50), "teal")
CALL = """
import json, sys
sys.path.insert(0, sys.argv[1])
from handler import EndpointHandler

handler = EndpointHandler(sys.argv[1])
for data in json.load(sys.stdin):
    try:
        print(json.dumps(handler(data)))
    except ValueError as error:
        print(json.dumps(f"ValueError: {error}"))
"""


def build(tmp_path: Path, model_class=TripsForRetrieval, args: CardArguments | None = None, **options) -> list[str]:
    folder = save_random_checkpoint(tmp_path / "checkpoint", model_class, TEXTS)
    (folder / "eval_results.json").write_text(
        json.dumps({"eval_txt_r1": 0.25, "eval_img_r1": 0.5, "eval_samples": 30})
    )
    files = build_repository(tmp_path / "target", folder, "ada/finder", args or CardArguments(), **options)
    return [path.relative_to(tmp_path / "target").as_posix() for path in files]


def test_results_prefer_the_test_split(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for split, recall in (("eval", 0.5), ("test", 0.25)):
        path = folder / f"{split}_results.json"
        path.write_text(json.dumps({f"{split}_img_r1": recall, f"{split}_samples": 30}))
        assert read_metrics(path) == ({"img_r1": recall}, 30)
        assert results_of(folder, CardArguments()) == path


def test_results_have_the_hub_format(tmp_path):
    names = build(tmp_path, args=CardArguments(eval_dataset="Pairs=ada/pairs", eval_split="test"))
    assert ".eval_results/ada__pairs.yaml" in names
    text = (tmp_path / "target" / ".eval_results" / "ada__pairs.yaml").read_text()
    entries = parse_eval_result_entries(yaml.safe_load(text))
    assert [(one.dataset_id, one.task_id, one.value) for one in entries] == [
        ("ada/pairs", "txt_r1", 0.25),
        ("ada/pairs", "img_r1", 0.5),
    ]
    assert {one.notes for one in entries} == {"split test, 30 examples"}


@pytest.mark.parametrize("args", [CardArguments(), CardArguments(eval_dataset="Pairs")])
def test_results_of_unknown_data_are_only_in_the_card(tmp_path, args):
    assert not [name for name in build(tmp_path, args=args) if name.startswith(".eval_results")]


def test_handler_is_written_for_supported_heads(tmp_path):
    assert "handler.py" not in build(tmp_path / "without")
    assert "handler.py" in build(tmp_path / "with", with_handler=True)
    with pytest.raises(ValueError, match="TripsForVisualGrounding"):
        build(tmp_path / "other", TripsForVisualGrounding, with_handler=True)


def call(folder: Path, requests: list[dict], environment: Path) -> list:
    """Return the handler's answer in a process without this project."""
    python = make_environment(environment)
    result = subprocess.run(
        [python, "-I", "-c", CALL, folder], input=json.dumps(requests), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith(("[", "{", '"'))]


@pytest.mark.slow
@pytest.mark.parametrize("name", HANDLED)
def test_handler_matches_the_library(name, tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    build(tmp_path, getattr(modeling_trips, name), with_handler=True)
    folder = tmp_path / "target"
    inputs = {"image": in_base64(IMAGE), "question": TEXTS[0], "texts": TEXTS, "prompt": TEXTS[0]}
    bad = [{}, {"inputs": {"image": "/etc/passwd", **{key: inputs[key] for key in ("question", "texts")}}}]
    found, *refused = call(folder, [{"inputs": inputs}, *bad], tmp_path_factory.getbasetemp() / "clean")
    model = getattr(modeling_trips, name).from_pretrained(folder).eval()
    processor = TripsProcessor.from_pretrained(folder)
    if name == "TripsForQuestionAnswering":
        expected = TripsVisualQuestionAnsweringPipeline(model=model, processor=processor)(IMAGE, TEXTS[0])
    elif name == "TripsForConditionalGeneration":
        expected = modeling_trips.TripsImageToTextPipeline(model=model, processor=processor)(IMAGE, prompt=TEXTS[0])
    else:
        batch = processor(images=IMAGE, text=TEXTS, image_index=[0] * len(TEXTS), return_tensors="pt")
        expected = {"scores": model.match(**batch).itm_logits.softmax(-1)[:, 1].tolist()}
    assert found == expected
    assert [type(one) for one in refused] == [str, str] and "`inputs.image`" in refused[1]


def in_base64(image: PIL.Image.Image, file_format: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, file_format)
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def handlers(tmp_path_factory) -> dict[str, EndpointHandler]:
    handlers = {}
    for name in HANDLED:
        folder = tmp_path_factory.mktemp("handlers")
        build(folder, getattr(modeling_trips, name), with_handler=True)
        handlers[name] = EndpointHandler(str(folder / "target"))
    return handlers


def ask(handler: EndpointHandler, parameters=None, **inputs):
    inputs = {"image": in_base64(IMAGE), "question": TEXTS[0], "texts": TEXTS, "prompt": TEXTS[0], **inputs}
    return handler(json.loads(json.dumps({"inputs": inputs, "parameters": parameters})))


@pytest.mark.parametrize("name", HANDLED)
def test_clients_cannot_run_code(name, handlers, tmp_path):
    code, ran = tmp_path / "custom_generate" / "generate.py", tmp_path / "ran"
    code.parent.mkdir()
    code.write_text(f"open({str(ran)!r}, 'w').close()\ndef generate(model, **options): return model.generate()\n")
    options = {"custom_generate": str(tmp_path), "trust_remote_code": True}
    for parameters in (options, {"generate_kwargs": options}):
        with pytest.raises(ValueError, match=next(iter(parameters))):
            ask(handlers[name], parameters)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *(("TripsForQuestionAnswering", {"num_beams": value}) for value in (0, 11, 10**30, True, "5")),
        ("TripsForQuestionAnswering", {"max_new_tokens": 65}),  # of the decoder's 64 positions
        ("TripsForQuestionAnswering", {"num_workers": 1}),
        ("TripsForQuestionAnswering", {"answers": "red"}),
        ("TripsForQuestionAnswering", {"answers": ["red", 1]}),
        ("TripsForQuestionAnswering", {"answers": ["red"] * (MAX_ANSWERS + 1)}),
        ("TripsForQuestionAnswering", {"answers": ["red" * MAX_TEXT_LENGTH]}),
        ("TripsForConditionalGeneration", {"top_k": 1}),
        ("TripsForRetrieval", {"top_k": 1}),
    ],
)
def test_unsupported_parameters_raise(name, parameters, handlers):
    with pytest.raises(ValueError, match=f"{next(iter(parameters))}"):
        ask(handlers[name], parameters)


def test_parameters_must_be_an_object(handlers):
    with pytest.raises(ValueError, match="`parameters`"):
        ask(handlers["TripsForQuestionAnswering"], "top_k")


def test_accepted_parameters_reach_the_pipeline(handlers):
    handler = handlers["TripsForQuestionAnswering"]
    answers = ["red", "teal", "picture"]
    for parameters in ({"top_k": 10}, {"top_k": 2, "answers": answers}, {"max_new_tokens": 64, "num_beams": 3}):
        assert ask(handler, parameters) == handler.pipeline(IMAGE, TEXTS[0], **parameters)
    describer = handlers["TripsForConditionalGeneration"]
    options = {"max_new_tokens": 2, "num_beams": 2}
    assert ask(describer, options) == describer.pipeline(IMAGE, prompt=TEXTS[0], **options)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("TripsForQuestionAnswering", {"question": ["red?"] * (MAX_TEXTS + 1)}),
        ("TripsForQuestionAnswering", {"question": "a" * (MAX_TEXT_LENGTH + 1)}),
        ("TripsForQuestionAnswering", {"question": None}),
        ("TripsForConditionalGeneration", {"prompt": ["a", "b"]}),
        ("TripsForRetrieval", {"texts": ["red"] * (MAX_TEXTS + 1)}),
        ("TripsForRetrieval", {"texts": []}),
        ("TripsForRetrieval", {"texts": "red"}),
    ],
)
def test_texts_are_bounded(name, inputs, handlers):
    with pytest.raises(ValueError, match=f"inputs.{next(iter(inputs))}"):
        ask(handlers[name], **inputs)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    "image",
    [
        "/etc/passwd",
        "http://127.0.0.1:1/a.png",
        5,
        None,
        "",
        base64.b64encode(EPS).decode(),
        in_base64(PIL.Image.new("RGB", (8, 8)), "TIFF"),
        in_base64(PIL.Image.new("1", (8000, 8000))),
        "A" * (MAX_IMAGE_BYTES * 2),
    ],
    ids=["path", "url", "number", "none", "empty", "EPS", "TIFF", "pixels", "bytes"],
)
def test_unsupported_images_raise(image, handlers, tmp_path, monkeypatch):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ValueError, match="image"):
        ask(handlers["TripsForQuestionAnswering"], image=image)
    assert not (tmp_path / "started").exists()


def test_decoded_images_are_accepted(handlers):
    handler = handlers["TripsForQuestionAnswering"]
    assert handler({"inputs": {"image": IMAGE, "question": TEXTS[0]}}) == ask(handler)
