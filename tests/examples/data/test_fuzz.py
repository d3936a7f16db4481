"""
Random files are read or named in an error of this project.

Each run uses the same few examples; FUZZ_EXAMPLES=100000 sets their number and draws other ones in each run.
"""

import csv
import io
import json
import os
import pickle
import tarfile
from functools import partial
from pathlib import Path

import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
from bad_rows import GOOD, PATCH_SIZE, tokenizer, write_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import EXAMPLES
from test_bad_rows import collate

from modeling_trips import TripsConfig
from trips_examples.data.faults import BadRowError, BadRows
from trips_examples.data.images import inspect_image
from trips_examples.data.loading import load_task_dataset
from trips_examples.data.shards import FileShard, TarShard, find_shards
from trips_examples.data.source import DataSource
from trips_examples.data.streams import PairStream
from trips_examples.data.tasks import TASKS
from trips_examples.data.texts import with_fitting_texts
from trips_examples.training.models import make_processor


EXAMPLES_OF_EACH = int(os.environ.get("FUZZ_EXAMPLES", 15))
fuzz = settings(
    max_examples=EXAMPLES_OF_EACH,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
each_task = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_images(folder)
    return folder


@pytest.fixture(scope="module")
def processor():
    return make_processor(tokenizer(), TripsConfig.from_preset("tiny"))


def is_ours(error: Exception) -> bool:
    """Return whether this project raised the error, and not a library."""
    place = error.__traceback__
    while place.tb_next is not None:
        place = place.tb_next
    return isinstance(error, (ValueError, FileNotFoundError)) and Path(
        place.tb_frame.f_code.co_filename
    ).resolve().is_relative_to(EXAMPLES)


def read(task: str, file: Path, folder: Path, **source) -> dict:
    """Return the rows of a file, or none if it is refused."""
    bad_rows = BadRows(image_check="decode", patch_size=PATCH_SIZE, collected=[])
    source = DataSource(train_file=str(file), image_root=str(folder), cache_dir=str(folder / "cache"), **source)
    try:
        return load_task_dataset(task, source, bad_rows)
    except Exception as error:
        if not is_ours(error):
            raise
        return {}


# Contents of files

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


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """Return the content with a few pieces replaced, removed or repeated."""
    place = st.integers(0, len(content))
    piece = st.one_of(st.binary(max_size=8), st.sampled_from([b'"', b"\n", b"\\", b"\xff", b"[" * 5000, b"\0" * 9]))

    def change(changes) -> bytes:
        changed = content
        for start, end, new in changes:
            changed = changed[:start] + new + changed[end:]
        return changed

    return st.lists(st.tuples(place, place, piece), max_size=3).map(change)


# Records


@each_task
def test_rows_that_are_read_make_batches(task, folder, processor):
    """The remaining rows pass the collators, and all others are named."""

    @fuzz
    @given(st.lists(records(task), max_size=6))
    def check(rows):
        file = folder / f"{task}.jsonl"
        file.write_text("\n".join(map(json.dumps, [GOOD[task], *rows])))
        data = read(task, file, folder)
        assert len(data["train"]) >= 1
        data = with_fitting_texts(data, task, processor, skip=True)
        assert collate(processor, task, data["train"]) == {}

    check()


def test_pairs_of_a_stream_are_read_or_named(folder, processor):
    @fuzz
    @given(st.lists(records("captions"), max_size=6))
    def check(rows):
        file = folder / "pairs.jsonl"
        file.write_text("\n".join(map(json.dumps, [GOOD["captions"], *rows])))
        log = folder / "log"
        stream = PairStream(find_shards([str(file)]), processor=processor, max_bad_share=1.0, log_folder=log)
        pairs, seen = iter(stream), []
        while (pair := next(pairs)) and stream.position.pass_number == 0:
            seen.append(pair)
        assert len(seen) >= 1
        for pair in seen:
            " ".join([pair["image_id"], pair["caption"], pair["source"]]).encode()

    check()


# Bytes


def content_of(suffix: str, task: str) -> bytes:
    rows = [GOOD[task]] * 3
    if suffix == ".jsonl":
        return "\n".join(map(json.dumps, rows)).encode()
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".csv":
        lines = io.StringIO()
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
        return lines.getvalue().encode()
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    return table.getvalue()


@each_task
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files_are_read_or_named(task, suffix, folder):
    @fuzz
    @given(mutated(content_of(suffix, task)))
    def check(content):
        file = folder / f"bytes{suffix}"
        file.write_bytes(content)
        read(task, file, folder)
        if task == "captions":
            list(FileShard(str(file), str(folder)))

    check()


def test_parquet_with_encoded_images_is_read_or_named(folder):
    image = (folder / "good.jpg").read_bytes()
    table = io.BytesIO()
    rows = {"image": [image] * 2, "caption": ["two dogs", "one dog"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), table)

    @fuzz
    @given(mutated(table.getvalue()))
    def check(content):
        file = folder / "images.parquet"
        file.write_bytes(content)
        read("captions", file, folder)

    check()


def test_tar_shards_are_read_or_named(folder):
    pytest.importorskip("webdataset")
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name, content in (("a.png", b"x"), ("a.txt", b"dog"), ("b.json", b'{"caption": "a"}'), ("b.jpg", b"y")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

    @fuzz
    @given(mutated(whole.getvalue()))
    def check(content):
        file = folder / "pairs.tar"
        file.write_bytes(content)
        for pair in TarShard(str(file)):
            (pair["source"] if isinstance(pair, dict) else pair.source).encode()

    check()


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_images_are_decoded_or_named(suffix, folder):
    pixels = PIL.Image.open(folder / "good.png")
    buffer = io.BytesIO()
    pixels.save(buffer, {"jpg": "JPEG"}.get(suffix, suffix))

    @fuzz
    @given(mutated(buffer.getvalue()))
    def check(content):
        (folder / "mutated").write_bytes(content)
        for how in ("header", "verify", "decode"):
            for image in (content, str(folder / "mutated")):
                found = inspect_image(image, how, PATCH_SIZE)
                assert isinstance(found, BadRowError) or min(found) >= PATCH_SIZE

    check()


# Public annotation files, with one value in them replaced

IMAGES = [{"id": 1, "file_name": "good.png", "coco_url": "http://x/val2014/good.png"}]
DOCUMENTS = {
    "vqa": {
        "data_subtype": "train2014",
        "questions": [{"image_id": 1, "question_id": 2, "question": "what color is it?"}] * 2,
    },
    "captions": {"images": IMAGES, "annotations": [{"id": 3, "image_id": 1, "caption": "two dogs"}] * 2},
    "karpathy": {
        "images": [{"filename": "a.png", "filepath": "b", "imgid": 1, "split": "train", "sentences": [{"raw": "a"}]}]
    },
    "nlvr2": [{"identifier": "train-1-0-0", "directory": 1, "sentence": "both are red", "label": "True"}] * 2,
    "grounding": [
        {"ref_id": 1, "ann_id": 4, "image_id": 1, "split": "train", "sentences": [{"sent": "dog", "sent_id": 5}]}
    ],
}
SECOND = {
    "vqa": {"annotations": [{"question_id": 2, "answers": [{"answer": "red"}]}]},
    "grounding": {"images": IMAGES, "annotations": [{"id": 4, "bbox": [1, 1, 9, 9], "image_id": 1}]},
}


def with_one_value_replaced(document) -> st.SearchStrategy:
    """Replace any of the nested values, or the whole."""
    if not isinstance(document, (dict, list)):
        return values
    items = document.items() if isinstance(document, dict) else enumerate(document)

    def with_item(place, new):
        changed = document.copy()
        changed[place] = new
        return changed

    inner = (with_one_value_replaced(value).map(partial(with_item, place)) for place, value in items)
    return st.one_of(values, *inner)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_public_files_are_read_or_named(name, folder):
    task = "captions" if name == "karpathy" else name

    @fuzz
    @given(with_one_value_replaced(DOCUMENTS[name]), with_one_value_replaced(SECOND.get(name, {})), st.booleans())
    def check(document, second, mutate_second):
        if mutate_second:
            document = DOCUMENTS[name]
        else:
            second = SECOND.get(name, {})
        given = {}
        if name in SECOND:
            (folder / "second.json").write_text(json.dumps(second))
            given = {"train_annotations": str(folder / "second.json")}
        if name == "grounding":
            file = folder / "refs.p"
            file.write_bytes(pickle.dumps(document))
        else:
            file = folder / "public.json"
            file.write_text(json.dumps(document))
        read(task, file, folder, **given)

    check()


def test_pickles_are_read_or_named(folder):
    (folder / "instances.json").write_text(json.dumps(SECOND["grounding"]))

    @fuzz
    @given(mutated(pickle.dumps(DOCUMENTS["grounding"])))
    def check(content):
        (folder / "mutated.p").write_bytes(content)
        read("grounding", folder / "mutated.p", folder)

    check()
