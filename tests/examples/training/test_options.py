"""Shared options of the scripts: errors, and defaults for the bundled synthetic data."""

from itertools import product

import pytest

from trips_examples.data.busy_scenes import busy_records
from trips_examples.data.tasks import TASKS
from trips_examples.data.vocabulary import BUNDLED_WORDS, train_wordpiece_tokenizer
from trips_examples.training.options import DataArguments
from trips_examples.training.runs import TripsTrainingArguments


@pytest.mark.parametrize(
    "option",
    [
        {"label_smoothing_factor": 0.1},
        {"predict_with_generate": False},
        {"max_steps": 0},
        {"save_steps": 0},
        {"per_device_train_batch_size": 0},
        {"per_device_eval_batch_size": -1},
        {"gradient_accumulation_steps": 0},
    ],
)
def test_unsupported_options_raise(option, tmp_path):
    with pytest.raises(ValueError, match=f"--{next(iter(option))}"):
        TripsTrainingArguments(output_dir=str(tmp_path), **option)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, (0.05, 500)),
        ({"save_steps": 100}, (0.05, 100)),
        ({"logging_steps": 20}, (20, 20)),
    ],
)
def test_logging_and_evaluation_steps(options, steps, tmp_path):
    args = TripsTrainingArguments(output_dir=str(tmp_path), eval_strategy="steps", **options)
    assert (args.logging_steps, args.eval_steps) == steps


def test_numbers_of_rows_are_positive():
    for name in ("max_train_samples", "max_eval_samples"):
        with pytest.raises(ValueError, match=f"--{name}"):
            DataArguments(**{name: -1}).check("vqa")


def test_bundled_tasks_share_a_vocabulary():
    tokenizer = train_wordpiece_tokenizer(DataArguments().vocabulary({}, "question"))
    assert {word for word in BUNDLED_WORDS if len(tokenizer.tokenize(word)) > 1} == set()
    texts = {"a picture of "}
    for task, grid in product(TASKS, (2, 4)):
        for record in busy_records(task, "train", 100, grid):
            columns = {"question", "answer", "statement", "expression"} & record.keys()
            texts |= {record[column] for column in columns} | set(record.get("captions", []))
    assert len(texts) > 500
    tokens = tokenizer.tokenize(" ".join(texts))
    assert not [token for token in tokens if token.startswith("##") or token == "[UNK]"]


def test_bundled_scenes_keep_their_size():
    for options, size in (({}, 96), ({"grid": 2}, 48), ({"dataset_name": "busy_scenes"}, 96)):
        assert DataArguments(**options).scene_size == size
    for options in ({"dataset_name": "someone/captions"}, {"train_file": "rows.jsonl"}):
        assert DataArguments(**options).scene_size is None
