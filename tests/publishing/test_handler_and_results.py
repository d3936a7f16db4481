"""What a repository holds for the Hub's services: results in its own form, and the handler of Inference Endpoints."""

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
    (tmp_path / "target").mkdir()
    files = build_repository(tmp_path / "target", folder, "ada/finder", args or CardArguments(), **options)
    return [path.relative_to(tmp_path / "target").as_posix() for path in files]


def test_results_are_written_as_the_hub_reads_them(tmp_path):
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
def test_results_of_no_data_set_of_the_hub_are_in_the_card_alone(tmp_path, args):
    assert not [name for name in build(tmp_path, args=args) if name.startswith(".eval_results")]


def test_a_handler_is_written_on_request_for_heads_that_it_knows(tmp_path):
    assert "handler.py" not in build(tmp_path / "without")
    assert "handler.py" in build(tmp_path / "with", with_handler=True)
    with pytest.raises(ValueError, match="not a TripsForVisualGrounding"):
        build(tmp_path / "other", TripsForVisualGrounding, with_handler=True)


def call(folder: Path, requests: list[dict], environment: Path) -> list:
    """What the handler answers in a process that has not this project."""
    python = make_environment(environment)
    result = subprocess.run(
        [python, "-I", "-c", CALL, folder], input=json.dumps(requests), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith(("[", "{", '"'))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TripsForQuestionAnswering", "TripsForConditionalGeneration", "TripsForRetrieval"])
def test_the_handler_answers_as_the_library_does(name, tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    build(tmp_path, getattr(modeling_trips, name), with_handler=True)
    folder = tmp_path / "target"
    file = io.BytesIO()
    IMAGE.save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    inputs = {"image": image, "question": TEXTS[0], "texts": TEXTS, "prompt": TEXTS[0]}
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
    assert refused == [
        "ValueError: `inputs` must be an object with an `image`.",
        "ValueError: `image` must be a picture in base64.",
    ]
