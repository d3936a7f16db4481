"""Faults of bad rows are the same from every reader, and are found before training."""

import json
from functools import partial
from itertools import islice

import pytest
from bad_rows import GOOD, PATCH_SIZE, BadRow, bad_rows, tokenizer, write_images
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_trips import TripsConfig
from trips_examples import check_data
from trips_examples.data.collators import (
    CaptionCollator,
    GroundingCollator,
    Nlvr2Collator,
    RetrievalCollator,
    VqaCollator,
)
from trips_examples.data.images import without_decoding
from trips_examples.data.loading import DataArguments, load_task_dataset, with_fitting_texts
from trips_examples.data.shards import find_shards
from trips_examples.data.streams import PairStream
from trips_examples.data.tasks import TASKS
from trips_examples.training.models import make_processor


COLLATORS = {
    "vqa": [VqaCollator, partial(VqaCollator, training=True)],
    "captions": [CaptionCollator, partial(CaptionCollator, training=True), RetrievalCollator],
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


def expected(rows, *found: str) -> dict[str, str]:
    return {f"rows.jsonl row {number}": row.reason for number, row in enumerate(rows, start=2) if row.found in found}


def collate(processor, task, dataset):
    """Collate each row in its own batch. Return the errors by source."""
    stopped = {}
    for collator in COLLATORS[task]:
        for row in without_decoding(dataset):
            try:
                collator(processor)([row])
            except ValueError as error:
                stopped[row["source"]] = str(error)
    return stopped


@each_task
def test_a_run_names_them_before_training(task, folder, processor):
    rows = bad_rows(task)
    source, faults = DataArguments(train_file=write(folder, task, rows)), []
    data = load_task_dataset(task, source, patch_size=PATCH_SIZE, faults=faults)
    assert {fault.source: fault.reason for fault in faults} == expected(rows, "reading")
    with pytest.raises(ValueError, match=f"{len(faults)} of the {len(rows) + 1} rows of rows.jsonl") as raised:
        load_task_dataset(task, source, patch_size=PATCH_SIZE)
    assert [line.strip() for line in str(raised.value).splitlines()[1:6]] == list(map(str, faults[:5]))

    unfit = expected(rows, "tokenizer")
    with pytest.raises(ValueError, match=f"{len(unfit)} of the .* rows of train") as raised:
        with_fitting_texts(data, task, processor, skip=False)
    assert all(f"{source}: {reason} (" in str(raised.value) for source, reason in unfit.items())
    data = with_fitting_texts(data, task, processor, skip=True)
    assert data["train"]["source"][:] == ["rows.jsonl row 1"]
    assert collate(processor, task, data["train"]) == {}


def test_a_repaired_or_damaged_image_is_checked_again(folder):
    """The rows are the same, and their result is cached."""
    source = DataArguments(train_file=write(folder, "vqa", [BadRow({**GOOD["vqa"], "image": "text.png"}, "")]))
    damaged, whole = (folder / "text.png").read_bytes(), (folder / "good.png").read_bytes()
    for content, num_faults in ((damaged, 1), (whole, 0), (damaged, 1)):
        (folder / "text.png").write_bytes(content)
        faults = []
        load_task_dataset("vqa", source, faults=faults)
        assert len(faults) == num_faults


@each_task
def test_check_data_names_them_all_in_the_same_words(task, folder, processor):
    rows = bad_rows(task)
    processor.save_pretrained(folder / "checkpoint")
    given = ["--task", task, "--train_file", write(folder, task, rows), "--tokenizer", str(folder / "checkpoint")]
    report = folder / "report.json"
    assert check_data.main([*given, "--output_json", str(report)]) == 1
    faults = {fault["source"]: fault["reason"] for fault in json.loads(report.read_text())["faults"]}
    assert faults == expected(rows, "reading", "tokenizer")


def test_a_stream_names_them_all_in_the_same_words(folder, processor):
    rows = bad_rows("captions")
    shards = find_shards([write(folder, "captions", rows)])
    stream = PairStream(shards, processor=processor, max_bad_share=1.0, log_folder=folder)
    pairs = list(islice(stream, 2))  # the second pass begins after all rows
    assert [pair["source"] for pair in pairs] == ["rows.jsonl row 1"] * 2
    lines = (folder / "bad_pairs-00000.jsonl").read_text().splitlines()
    named = {pair["source"]: pair["error"].partition(" (")[0] for pair in map(json.loads, lines)}
    assert named == expected(rows, "reading", "tokenizer")


# Random rows

texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["good.png", "good.jpg", "none.png", "mode_f.tiff", "pixel.png", "cut.gif", "../x", "\0"]),
    st.sampled_from(["", " ", "[1", '["a"]', '["good.png", "good.jpg"]', "[0, 0, 4, 4]", "a|b", "|", "true", "nan"]),
)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
keys = st.one_of(st.sampled_from(["bytes", "path", "answer", "raw"]), texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=8,
)


@each_task
def test_random_rows_are_named_or_make_batches(task, folder, processor):
    columns = st.one_of(st.sampled_from([*TASKS[task].features, "left_image", "right_image", "answer"]), texts)
    record = st.dictionaries(columns, values, max_size=4).map(lambda changed: {**GOOD[task], **changed})

    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(st.lists(record, max_size=6))
    def check(rows):
        file = folder / "random.jsonl"
        file.write_text("\n".join(map(json.dumps, [GOOD[task], *rows])))
        data = load_task_dataset(task, DataArguments(train_file=str(file)), patch_size=PATCH_SIZE, faults=[])
        assert len(data["train"]) >= 1
        data = with_fitting_texts(data, task, processor, skip=True)
        assert collate(processor, task, data["train"]) == {}

    check()
