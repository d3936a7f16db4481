"""All readers report the same faults of bad rows, before training if possible."""

import json
import logging
import os
from itertools import islice

import pytest
from bad_rows import GOOD, PATCH_SIZE, bad_rows, tokenizer, write_images
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_trips import TripsConfig
from trips_examples import check_data
from trips_examples.data.faults import BadRows
from trips_examples.data.loading import load_task_dataset
from trips_examples.data.rows import without_decoding
from trips_examples.data.shards import find_shards
from trips_examples.data.source import DataSource
from trips_examples.data.streams import PairStream
from trips_examples.data.task_collators import (
    CaptionCollator,
    GroundingCollator,
    Nlvr2Collator,
    RetrievalCollator,
    VqaCollator,
)
from trips_examples.data.tasks import TASKS
from trips_examples.data.texts import with_fitting_texts
from trips_examples.training.models import make_processor


COLLATORS = {
    "vqa": [VqaCollator],
    "captions": [CaptionCollator, RetrievalCollator],
    "nlvr2": [Nlvr2Collator],
    "grounding": [GroundingCollator],
}
each_task = pytest.mark.parametrize("task", TASKS)


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def processor():
    return make_processor(tokenizer(), TripsConfig.from_preset("tiny"))


def write(folder, task, rows) -> str:
    """Write a file with a good row 1, followed by the bad rows."""
    file = folder / "rows.jsonl"
    file.write_text("\n".join([json.dumps(GOOD[task]), *(row.line for row in rows)]))
    return str(file)


def said(faults) -> dict[str, str]:
    """Return the reason by source."""
    return {fault.source: fault.reason for fault in faults}


def expected(rows, *found: str) -> dict[str, str]:
    return {f"rows.jsonl row {number}": row.reason for number, row in enumerate(rows, start=2) if row.found in found}


def collate(processor, task, dataset):
    """Collate each row in its own batch. Return the errors by source."""
    stopped = {}
    for collator in COLLATORS[task]:
        for training in (False, True):
            for row in without_decoding(dataset):
                try:
                    collator(processor, training=training, augment=training)([row])
                except ValueError as error:
                    stopped[row["source"]] = str(error)
    return stopped


@each_task
def test_a_run_names_them_before_training_or_in_the_batch(task, folder, processor):
    rows = bad_rows(task)
    source = DataSource(train_file=write(folder, task, rows))
    faults = []
    data = load_task_dataset(task, source, BadRows(patch_size=PATCH_SIZE, collected=faults))
    assert said(faults) == expected(rows, "reading")
    with pytest.raises(ValueError, match=f"{len(faults)} of the {len(rows) + 1} rows of rows.jsonl") as raised:
        load_task_dataset(task, source, BadRows(patch_size=PATCH_SIZE))
    assert [line.strip() for line in str(raised.value).splitlines()[1:6]] == list(map(str, faults[:5]))

    unfit = expected(rows, "tokenizer")
    with pytest.raises(ValueError, match=f"{len(unfit)} of the .* rows of train") as raised:
        with_fitting_texts(data, task, processor, skip=False)
    assert all(f"{source}: {reason} (" in str(raised.value) for source, reason in unfit.items())

    data = with_fitting_texts(data, task, processor, skip=True)
    stopped = collate(processor, task, data["train"])
    assert stopped.keys() == expected(rows, "decoding").keys()
    assert all(error.startswith(f"{source}: unreadable image (") for source, error in stopped.items())


@each_task
def test_a_run_that_may_skip_skips_and_counts_them_all(task, folder, processor, caplog):
    rows = bad_rows(task)
    source = DataSource(train_file=write(folder, task, rows))
    with caplog.at_level(logging.WARNING):
        data = load_task_dataset(task, source, BadRows(skip=True, patch_size=PATCH_SIZE))
        data = with_fitting_texts(data, task, processor, skip=True)
    assert data["train"]["source"][:] == ["rows.jsonl row 1"]
    assert collate(processor, task, data["train"]) == {}
    read, unfit = (len(expected(rows, *found)) for found in (("reading", "decoding"), ("tokenizer",)))
    assert f"Skipped {read} of the {len(rows) + 1} rows of rows.jsonl (" in caplog.text
    assert f"Skipped {unfit} of the {unfit + 1} rows of train (" in caplog.text


@each_task
def test_check_data_names_them_all_in_the_same_words(task, folder, processor):
    rows = bad_rows(task)
    processor.save_pretrained(folder / "checkpoint")
    given = ["--task", task, "--train_file", write(folder, task, rows), "--tokenizer_name", str(folder / "checkpoint")]
    report = folder / "report.json"
    assert check_data.main([*given, "--output_json", str(report)]) == 1
    faults = {fault["source"]: fault["reason"] for fault in json.loads(report.read_text())["faults"]}
    assert faults == expected(rows, "reading", "tokenizer", "decoding")


def test_a_stream_names_them_all_in_the_same_words(folder, processor):
    rows = bad_rows("captions")
    stream = PairStream(
        find_shards([write(folder, "captions", rows)]),
        processor=processor,
        max_bad_share=1.0,
        log_folder=folder,
    )
    pairs = list(islice(stream, 2))  # the second pass begins after all rows
    assert [pair["source"] for pair in pairs] == ["rows.jsonl row 1"] * 2
    lines = (folder / "bad_pairs-00000.jsonl").read_text().splitlines()
    named = {pair["source"]: pair["error"].partition(" (")[0] for pair in map(json.loads, lines)}
    assert named == expected(rows, "reading", "tokenizer", "decoding")


def test_words_that_the_tokenizer_does_not_know_are_told(processor, caplog):
    """Models cannot learn such an answer: it is [UNK], which decodes to an empty text."""
    answers = [["red", "\u2603"], ["\u2603"], ["q\u2603"]]
    rows = Dataset.from_dict({"question": ["what color is it?"] * 3, "answers": answers, "source": ["a", "b", "c"]})
    assert len(with_fitting_texts(DatasetDict(train=rows), "vqa", processor, skip=False)["train"]) == 3
    assert "2 different answers hold words that the tokenizer does not know, e.g. '\u2603', 'q\u2603'" in caplog.text


@each_task
def test_images_in_a_table_are_looked_at_as_closely(task, folder):
    """Parquet files with encoded images are checked like files. Data sets on the Hub are read in the same way."""
    column = TASKS[task].image_column
    rows = [row for row in bad_rows(task) if row.file is not None]

    def with_encoded_images(record):
        names = record[column] if isinstance(record[column], list) else [record[column]]
        images = [{"bytes": (folder / name).read_bytes(), "path": None} for name in names]
        return {**record, column: images if task == "nlvr2" else images[0]}

    file = folder / "rows.parquet"
    Dataset.from_list(
        [with_encoded_images(record) for record in [GOOD[task], *(row.record for row in rows)]]
    ).to_parquet(file)
    source = DataSource(train_file=str(file), cache_dir=str(folder / "cache"))
    for check, found in (("verify", ["reading"]), ("decode", ["reading", "decoding"])):
        faults = []
        load_task_dataset(task, source, BadRows(image_check=check, patch_size=PATCH_SIZE, collected=faults))
        assert {fault.source.replace("parquet", "jsonl"): fault.reason for fault in faults} == expected(rows, *found)


# Random rows. FUZZ_EXAMPLES=100000 sets their number and draws other ones in each run.

texts = st.one_of(
    st.text(st.characters(exclude_categories=[]), max_size=8),  # lone surrogates, too
    st.sampled_from(["good.png", "good.jpg", "none.png", "mode_f.tiff", "pixel.png", "cut.gif", "../x", "\0"]),
    st.sampled_from(["", " ", "[1", '["a"]', '["good.png", "good.jpg"]', "[0, 0, 4, 4]"]),
    st.sampled_from(["red", "red " * 70, "\ufffd", "a|b", "|", "1.0", "true", "nan", "a/" * 3000]),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    texts,
    st.sampled_from([10**4000, -1, 0, 1e308, 1e-320, 40, 32]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.one_of(st.sampled_from(["bytes", "path", "answer", "raw"]), texts), inner, max_size=3),
    ),
    max_leaves=8,
)


def records(task: str) -> st.SearchStrategy[dict]:
    columns = [*GOOD[task], *TASKS[task].columns, "left_image", "right_image", "text", "url"]
    return st.dictionaries(st.one_of(st.sampled_from(columns), texts), values, max_size=4).map(
        lambda changed: {**GOOD[task], **changed}
    )


@each_task
def test_random_rows_are_named_or_make_batches(task, folder, processor):
    @settings(
        max_examples=int(os.environ.get("FUZZ_EXAMPLES", 15)),
        deadline=None,
        derandomize="FUZZ_EXAMPLES" not in os.environ,
        database=None,
    )
    @given(st.lists(records(task), max_size=6))
    def check(rows):
        file = folder / "random.jsonl"
        file.write_text("\n".join(map(json.dumps, [GOOD[task], *rows])))
        bad_rows = BadRows(image_check="decode", patch_size=PATCH_SIZE, collected=[])
        data = load_task_dataset(task, DataSource(train_file=str(file)), bad_rows)
        assert len(data["train"]) >= 1
        data = with_fitting_texts(data, task, processor, skip=True)
        assert collate(processor, task, data["train"]) == {}

    check()
