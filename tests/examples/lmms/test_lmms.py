"""
lmms-eval with TRIPS as its model: its tasks VQAv2 and RefCOCO with bundled synthetic data.
"""

import json
from pathlib import Path

import datasets
import PIL.Image
import pytest
import torch

from modeling_trips import TripsForQuestionAnswering, TripsForVisualGrounding, TripsProcessor
from modeling_trips import TripsVisualQuestionAnsweringPipeline as Pipeline
from trips_examples import ask
from trips_examples.data.busy_scenes import busy_records
from trips_examples.data.images import read_image


NUM_ROWS = 48
TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    validation: {file}
test_split: validation
output_type: generate_until
"""
QUESTIONS = """
doc_to_visual: !function tools.vqav2_doc_to_visual
doc_to_text: !function tools.vqav2_doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
  custom_generate: mallory/foreign
  trust_remote_code: true
process_results: !function tools.vqav2_process_results_val
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: "\\nAnswer the question using a single word or phrase."
"""
BOXES = """
process_docs: !function tools.refcoco_bbox_rec_preprocess_dataset
doc_to_visual: !function tools.refcoco_bbox_rec_doc_to_visual
doc_to_text: !function tools.refcoco_bbox_rec_doc_to_text
doc_to_target: bbox
generation_kwargs:
  until: ["ASSISTANT:"]
process_results: !function tools.refcoco_bbox_rec_process_result
metric_list:
  - metric: refcoco_IoU
    aggregation: !function tools.refcoco_bbox_rec_iou
    higher_is_better: true
"""
TOOLS = """
from lmms_eval.tasks.refcoco.utils_rec import *
from lmms_eval.tasks.vqav2.utils import *
"""

pytestmark = pytest.mark.slow


def run_task(run_python, folder: Path, name: str, text: str, rows: datasets.Dataset, model_args: str):
    """Run a task. Return its results and the log of each row."""
    rows.to_parquet(folder / "rows.parquet")
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=folder / "rows.parquet") + text)
    (folder / "tools.py").write_text(TOOLS)
    command = ["-m", "lmms_eval", "--model", "trips", "--model_args", model_args, "--tasks", name]
    command += ["--include_path", str(folder), "--output_path", str(folder / "results"), "--log_samples"]
    result = run_python(*command, "--batch_size", "16")
    # The exit code of a failure is 0 too, but there is no table.
    assert result.returncode == 0 and f"|{name}|" in result.stdout, (result.stdout + result.stderr)[-4000:]
    (results,) = (folder / "results").rglob("*_results.json")
    (samples,) = (folder / "results").rglob("*_samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"][name], sorted(lines, key=lambda line: line["doc_id"])


def test_answers_match_the_pipeline(run_python, tmp_path):
    records = [record for record, _ in zip(busy_records("vqa", "test", NUM_ROWS), range(NUM_ROWS))]
    images = [read_image(record) for record in records]
    rows = {
        "image": images,
        "question": [record["question"] for record in records],
        "answer": [record["answer"] for record in records],
        "answers": [[{"answer": record["answer"], "answer_id": person} for person in range(10)] for record in records],
        "question_id": list(range(NUM_ROWS)),
    }
    model = TripsForQuestionAnswering.from_pretrained(ask.CHECKPOINT, keep_rate=0.1).eval()
    pipeline = Pipeline(model=model, processor=TripsProcessor.from_pretrained(ask.CHECKPOINT))
    expected = [pipeline(*pair, top_k=1)[0]["answer"] for pair in zip(images, rows["question"])]
    right = [answer == record["answer"] for answer, record in zip(expected, records)]
    assert 0.3 < sum(right) / NUM_ROWS < 1  # to compare both kinds and check that the keep rate reaches the model

    arguments = f"pretrained={ask.CHECKPOINT},keep_rate=0.1"
    task = "busy_scenes_as_vqav2"
    results, lines = run_task(run_python, tmp_path, task, QUESTIONS, datasets.Dataset.from_dict(rows), arguments)
    assert [line["filtered_resps"] for line in lines] == expected
    assert results["exact_match,none"] == pytest.approx(sum(right) / NUM_ROWS)


def test_boxes_are_relative(run_python, tmp_path):
    torch.manual_seed(0)
    sizes = [(96, 48), (60, 90)]
    images = [PIL.Image.effect_noise(size, 80).convert("RGB") for size in sizes]
    checkpoint = tmp_path / "checkpoint"
    grounding = TripsForVisualGrounding.from_pretrained(ask.CHECKPOINT).float().eval()
    grounding.save_pretrained(checkpoint)
    processor = TripsProcessor.from_pretrained(ask.CHECKPOINT)
    processor.save_pretrained(checkpoint)

    texts = [["the red circle", "the blue shape"], ["the triangle"]]
    rows = {
        "image": images,
        "answer": texts,
        "bbox": [[8.0, 4.0, 40.0, 30.0], [5.0, 6.0, 50.0, 60.0]],
        "question_id": ["a", "b"],
    }
    task = "boxes_as_refcoco"
    results, lines = run_task(
        run_python, tmp_path, task, BOXES, datasets.Dataset.from_dict(rows), f"pretrained={checkpoint}"
    )
    found = [json.loads(line["filtered_resps"]) for line in lines]
    assert len(found) == 3 and found[0] != found[1]
    for number, text, box in zip((0, 0, 1), sum(texts, []), found):
        inputs = processor(images=images[number], text=text, return_tensors="pt")
        with torch.no_grad():
            pixels = processor.post_process_grounding(grounding(**inputs), [sizes[number][::-1]])[0]
        width, height = sizes[number]
        torch.testing.assert_close(torch.tensor(box), pixels / torch.tensor([width, height] * 2), atol=1e-3, rtol=0)
    assert 0 <= results["refcoco_IoU,none"] <= 1
