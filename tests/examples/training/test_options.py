"""Shared options of the scripts: errors, and defaults for the bundled synthetic data."""

from itertools import product

from trips_examples.data.busy_scenes import busy_records
from trips_examples.data.tasks import TASKS
from trips_examples.data.vocabulary import BUNDLED_WORDS, train_tokenizer
from trips_examples.training.options import DataArguments


def test_bundled_tasks_share_a_vocabulary():
    tokenizer = train_tokenizer(DataArguments().vocabulary({}, "question"))
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
