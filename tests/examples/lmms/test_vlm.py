"""lmms-eval with vision-language models of Transformers."""

import json
from pathlib import Path

import datasets
import pytest
from tiny_vlm_processors import conversation, noise, save_tiny_vlm

from trips_examples.lmms.generation import VisionLanguageModel


TASK = """
task: tiny_words
dataset_path: parquet
dataset_kwargs:
  data_files:
    validation: {file}
test_split: validation
output_type: generate_until
doc_to_visual: !function tools.images_of
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 3
  custom_generate: mallory/foreign
  trust_remote_code: true
process_results: !function tools.compare
metric_list:
  - metric: same_answer
    aggregation: mean
    higher_is_better: true
"""
TOOLS = """
def images_of(doc):
    return [image.convert("RGB") for image in doc["images"]]


def compare(doc, results):
    return {"same_answer": float(results[0] == doc["answer"])}
"""
OPTIONS = {"max_new_tokens": 3}
NUM_ROWS = 6

pytestmark = pytest.mark.slow


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save_tiny_vlm("llava", tmp_path / "checkpoint")


def write_task(folder: Path, checkpoint: Path) -> list[list[dict]]:
    """Write a task with the unpruned model's answers as truth, except the last. Return its conversations."""
    images = [[noise(40 + 8 * row, 40, seed=row)] for row in range(NUM_ROWS - 1)] + [[noise(40, 40), noise(64, 32)]]
    questions = ["what color is it ?", "which one is the same ?"] * (NUM_ROWS // 2)
    asked = [conversation(text, *own) for text, own in zip(questions, images)]
    vlm = VisionLanguageModel(checkpoint)
    answers = [vlm.answer([own], OPTIONS)[0] for own in asked]
    assert len({*answers}) > 1
    rows = {"images": images, "question": questions, "answer": [*answers[:-1], "wrong"]}
    text = datasets.Value("string")
    features = {"images": datasets.List(datasets.Image()), "question": text, "answer": text}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(folder / "rows.parquet")
    (folder / "tiny_words.yaml").write_text(TASK.format(file=folder / "rows.parquet"))
    (folder / "tools.py").write_text(TOOLS)
    return asked


def test_task_answers_match_the_model(checkpoint, run_python, tmp_path):
    asked = write_task(tmp_path, checkpoint)
    schedule = "1:image:0.75,2:image:0.5"
    vlm = VisionLanguageModel(checkpoint, schedule, visual_tokens=6, scorer="divprune", device="cpu")
    expected = [vlm.answer([own], OPTIONS)[0] for own in asked]

    command = ["-m", "lmms_eval", "--model", "trips_vlm", "--tasks", "tiny_words", "--batch_size", "4"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "results"), "--log_samples"]
    model_args = f'pretrained={checkpoint},schedule="{schedule}",visual_tokens=6,scorer=divprune,device=cpu'
    result = run_python(*command, "--model_args", model_args)
    # The exit code of a failure is 0 too, but there is no table.
    assert result.returncode == 0 and "|tiny_words|" in result.stdout, (result.stdout + result.stderr)[-4000:]
    (samples,) = (tmp_path / "results").rglob("*_samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["filtered_resps"] for line in sorted(lines, key=lambda line: line["doc_id"])] == expected
