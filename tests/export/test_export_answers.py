"""The checkpoint that comes with the project, exported by the command: it answers as PyTorch does."""

import json
import sys

import pytest
import torch
from killed import kill_when
from PIL import Image
from places import EXAMPLES
from random_checkpoint import save_random_checkpoint
from torch.testing import assert_close

from modeling_trips import TripsForQuestionAnswering, TripsModel, TripsProcessor, TripsVisualQuestionAnsweringPipeline
from modeling_trips.export import load_exported
from modeling_trips.export.__main__ import main, read_calibration
from trips_examples.data.busy_scenes import busy_records
from trips_examples.data.images import read_image


CHECKPOINT = EXAMPLES / "trips-tiny-scenes"
SCHEDULE = "2:text:0.005"
WAYS = [("onnx", "fp32", False), ("openvino", "int8", True)]


@pytest.fixture(scope="module")
def processor():
    return TripsProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def questions():
    """Return 600 questions of the test split and their images."""
    records = list(busy_records("vqa", "test", 75))
    return [record["question"] for record in records], [read_image(record) for record in records]


def load_model():
    return TripsForQuestionAnswering.from_pretrained(CHECKPOINT, schedule=SCHEDULE).eval()


def answers_of(model, processor, texts, images):
    """Return the answers, and the kept patches by layer."""
    answers = []
    kept = []
    for start in range(0, len(texts), 100):
        batch = slice(start, start + 100)
        inputs = processor(images=images[batch], text=texts[batch], return_tensors="pt")
        answers += processor.post_process_answers(model.generate(**inputs))
        with torch.no_grad():
            kept.append([layer.kept_indices for layer in model.model(**inputs).selection])
    return answers, [torch.cat(layers) for layers in zip(*kept)]


@pytest.fixture(scope="module")
def expected(processor, questions):
    texts, images = questions
    return answers_of(load_model(), processor, texts, images)


@pytest.fixture(scope="module")
def calibration_file(tmp_path_factory):
    """Write rows of the training split, one question per image."""
    folder = tmp_path_factory.mktemp("rows")
    rows = {}
    for record in busy_records("vqa", "train", 100):
        name = f"{record['image_id']}.png"
        (folder / name).write_bytes(record["image"]["bytes"])
        rows[name] = json.dumps({"image": name, "question": record["question"]})
    (folder / "rows.jsonl").write_text("\n".join(rows.values()))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: "-".join(map(str, way)))
def exported(request, tmp_path_factory, calibration_file):
    backend, dtype, is_calibrated = request.param
    folder = tmp_path_factory.mktemp("export") / "model"
    options = ["--model", str(CHECKPOINT), "--output_dir", str(folder)]
    options += ["--backend", backend, "--dtype", dtype, "--schedule", SCHEDULE]
    if is_calibrated:
        options += ["--calibration_file", str(calibration_file)]
    main(options)
    return dtype, load_exported(folder), TripsProcessor.from_pretrained(folder)


@pytest.mark.slow
def test_answers_and_patches_match_pytorch(exported, questions, expected):
    texts, images = questions
    dtype, model, processor = exported
    answers, kept = answers_of(model, processor, texts, images)
    expected_answers, expected_kept = expected
    same = sum(answer == other for answer, other in zip(answers, expected_answers)) / len(texts)
    same_patches = []
    for indices, expected_indices in zip(kept, expected_kept, strict=True):
        is_in_both = (indices[:, :, None] == expected_indices[:, None]).any(-1)
        same_patches.append(is_in_both.float().mean())
    print(dtype, same, same_patches)
    if dtype == "fp32":
        assert same == 1.0
        assert all(map(torch.equal, kept, expected_kept))
    assert same >= 0.99
    assert min(same_patches) > 0.95

    def best_answers_of(model):
        answerer = TripsVisualQuestionAnsweringPipeline(model=model, processor=processor)
        return [best["answer"] for best, *_ in answerer(images[0], texts[:2], top_k=2)]

    assert best_answers_of(model) == best_answers_of(load_model())


@pytest.mark.parametrize(
    "columns",
    [
        {"question": "is it red?", "answer": "yes"},
        {"captions": ["is it red?", "two"]},
    ],
    ids=lambda columns: next(iter(columns)),
)
def test_calibration_reads_training_files(columns, processor, tmp_path):
    """Paths are relative to a folder, and the file has empty lines and line separators within a text."""
    image = Image.new("RGB", (64, 64), "teal")
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images/1.png")
    row = json.dumps({"image": "1.png", **columns, "image_id": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text(f"\n{row}\n\n{row}\n", encoding="utf-8")
    expected = dict(processor(images=image, text="is it red?", return_tensors="pt"))
    first, second = read_calibration(str(tmp_path / "rows.jsonl"), str(tmp_path / "images"), processor)
    assert_close(dict(first), expected, rtol=0, atol=0)
    assert_close(dict(second), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_a_killed_export_is_whole_or_absent(tmp_path):
    """The folder gets its name last, when the processor is in it, too."""
    model = save_random_checkpoint(tmp_path / "model", TripsModel, ["is it red?"])
    command = [sys.executable, "-m", "modeling_trips.export", "--model", str(model), "--backend", "onnx"]
    kill_when(lambda: (tmp_path / "out").exists(), [*command, "--output_dir", str(tmp_path / "out")])
    assert isinstance(load_exported(tmp_path / "out"), TripsModel)
    TripsProcessor.from_pretrained(tmp_path / "out")
