"""Loading of each task from files, Parquet, folders and data sets; each kind of bad row is found before training."""

import json
from functools import partial
from itertools import islice

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from bad_rows import GOOD as GOOD_ROWS
from bad_rows import PATCH_SIZE, bad_rows, tokenizer, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import encoded, load, write
from PIL import Image

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
from trips_examples.data.records import read_records
from trips_examples.data.streams import PairStream, find_shards
from trips_examples.data.tasks import TASKS
from trips_examples.training.models import make_processor
from trips_examples.training.options import ModelArguments


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path)
    Image.new("L", (4, 3), 200).save(tmp_path / "a.png")
    Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / "b.png")
    return tmp_path


IMAGES = ("a.png", "b.png")
A, B = (4, 3), (32, 32)  # their sizes
GOOD = [
    {"image": "a.png", "question": "what?", "answer": "red", "region": [0, 1, 3.5, 3]},
    {"image": "a.png", "question": "how many?", "answers": ["2", "two"]},
    {"image": "b.png", "question": "where?", "answer": 3, "image_id": 8, "question_id": "q9"},
]
# Records of each task, and the expected columns of their rows.
FILES = {
    "vqa": (
        GOOD,
        {
            "answers": [["red"], ["2", "two"], ["3"]],
            "region": [[0.0, 1.0, 3.5, 3.0], None, None],
            "question_id": ["1", "2", "q9"],
            "image_id": ["{folder}/a.png", "{folder}/a.png", "8"],
            "source": [1, 2, 3],
        },
    ),
    "captions": (
        [{"image": "a.png", "caption": "one"}, {"image": "b.png", "captions": ["two", "three"], "image_id": 7}],
        {"caption": ["one", "two", "three"], "image_id": ["{folder}/a.png", "7", "7"], "source": [1, 2, 2]},
    ),
    "nlvr2": (
        [
            {"left_image": "a.png", "right_image": "b.png", "statement": "left", "label": "True"},
            # pandas writes labels as floats where one is missing
            {"images": ["b.png", "a.png"], "statement": "right", "label": 0.0, "image_ids": ["x", "y"]},
        ],
        {"label": [1, 0], "image_ids": [["{folder}/a.png", "{folder}/b.png"], ["x", "y"]], "source": [1, 2]},
    ),
    "grounding": (
        [
            {"image": "a.png", "expression": "a dog", "box": [0, 1, 3.5, 3]},
            {"image": "b.png", "expression": "it", "box": [-0.5, 0, 32.5, 31]},  # cut to the image
        ],
        {"box": [[0, 1, 3.5, 3], [0, 0, 32, 31]], "source": [1, 2]},
    ),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("task", FILES)
def test_file_of_each_format(folder, suffix, task):
    records, expected = FILES[task]
    expected = json.loads(json.dumps(expected).replace("{folder}", str(folder)))
    file = write(folder / f"train.{suffix}", records)
    loaded = load(task, train_file=file, validation_file=str(file))
    assert list(loaded) == ["train", "validation"]
    rows = loaded["train"]
    assert rows.features == TASKS[task].features
    assert rows["source"][:] == [f"train.{suffix} row {number}" for number in expected["source"]]
    for name in expected.keys() - {"source"}:
        assert rows[name][:] == expected[name]
    first, last = rows[0]["images"] if task == "nlvr2" else (rows[0]["image"], rows[-1]["image"])
    assert first.size == A
    assert first.mode == "L"  # as it is stored
    assert last.tobytes() == Image.open(folder / "b.png").tobytes()


def test_the_lists_of_albef(folder):
    question = {"question_id": 5, "question": "what?", "answer": ["2", "two"], "image": "a.png", "dataset": "vqa"}
    (row,) = load("vqa", train_file=write(folder / "vqa_train.json", [question]))["train"]
    assert row["question_id"] == "5"
    assert row["answers"] == ["2", "two"]
    statement = {"sentence": "left", "label": "False", "images": ["a.png", "b.png"]}
    (row,) = load("nlvr2", train_file=write(folder / "nlvr_train.json", [statement]))["train"]
    assert row["statement"] == "left"
    assert row["label"] == 0


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_bad_rows_are_skipped_and_counted(folder, suffix, caplog):
    first, _, third = GOOD
    without_image = {**first, "image": "none.png"}
    without_question = {**first, "question": " "}
    other_image = {**first, "image_id": third["image_id"]}
    records = [without_image, first, without_image, without_question, third, other_image]
    file = write(folder / f"train.{suffix}", records)
    rows = load("vqa", train_file=file, skip_bad_rows=True)["train"]
    assert rows["source"][:] == [f"train.{suffix} row 2", f"train.{suffix} row 5"]
    assert f"Skipped 4 of the 6 rows of train.{suffix} (missing image: 2, " in caplog.text
    assert "no question: 1" in caplog.text
    assert "image_id of two images: 1" in caplog.text


def test_a_blank_cell_is_not_among_the_columns_that_a_row_has(folder):
    file = write(folder / "train.jsonl", [{"image": "a.png", "question": " ", "answer": "red"}])
    with pytest.raises(ValueError, match="no question.* image, answer"):
        load("vqa", train_file=file)


STRAY = "image,question,answer\na.png,what?,red\na.png,{}\na.png,why?,blue\na.png,{}\na.png,who?,red\n"


@pytest.mark.parametrize(
    "content, number",
    [
        ("image,question,answer\na.png,what, then?,red\n", 1),  # `load_dataset` shifts all columns
        (STRAY.format('how?,"red', "where?,red"), 2),  # a quote that no other one closes
        (STRAY.format('how?,"red', 'where?,red"'), 2),
        (STRAY.format('"how?,red', 'where" is it?,red'), 2),
        ('question,answer,image\nwhat?,"red,a.png\nwhy?,blue,a.png\nhow?,red",a.png\n', 1),
    ],
)
def test_rows_of_csv_that_quotes_or_commas_swallow_are_named(folder, content, number):
    (folder / "train.csv").write_text(content)
    with pytest.raises(ValueError, match=f"train.csv .*row {number}"):
        load("vqa", train_file=folder / "train.csv", skip_bad_rows=True)


@pytest.mark.parametrize("caption", ["a dog\na cat, brown", "a dog,\na cat", "a dog\n"])
def test_a_cell_of_csv_may_have_several_lines(tmp_path, caption):
    file = tmp_path / "train.csv"
    file.write_text(f'image,caption\n1.jpg,"{caption}"\n')
    assert list(read_records(file)) == [(1, {"image": "1.jpg", "caption": caption})]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt"])
def test_a_table_is_read_as_excel_writes_it(tmp_path, separator, encoding, suffix):
    file = tmp_path / f"train{suffix}"
    lines = [("image", "question", "answer"), ("a.png", "Für wen?", f'"rot{separator} blau"')]
    file.write_text("\r\n".join(map(separator.join, lines)), encoding=encoding, newline="")
    record = {"image": "a.png", "question": "Für wen?", "answer": f"rot{separator} blau"}
    assert list(read_records(file)) == [(1, record)]


def test_a_workbook_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="CSV UTF-8"):
        list(read_records(tmp_path / "photos.xlsx"))


def test_names_that_occur_twice_are_refused(folder):
    (folder / "train.csv").write_text("image,question,answer,answer\na.png,what?,red,blue\n")
    (folder / "train.json").write_text('[{"image": "a.png", "question": "what?", "answer": "red", "answer": "blue"}]')
    for name in ("train.csv", "train.json"):
        with pytest.raises(ValueError, match=f"{name}.*'answer'"):
            load("vqa", train_file=folder / name, skip_bad_rows=True)


def test_one_image_in_two_spellings_of_its_path(folder):
    records = [{**GOOD[0], "image": "a.png"}, {**GOOD[0], "image": "./a.png"}]
    first, second = load("vqa", train_file=write(folder / "train.jsonl", records))["train"]
    assert first["image_id"] == second["image_id"]


def test_texts_in_csv_are_kept(folder):
    file = folder / "train.csv"
    file.write_text('image,question,answers\na.png,01,"[""red|blue"", ""gray""]"\na.png,"None,\nor 2",red | blue|\n')
    rows = load("vqa", train_file=file)["train"]
    assert rows["question"][:] == ["01", "None,\nor 2"]
    assert rows["answers"][:] == [["red|blue", "gray"], ["red", "blue"]]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_byte_order_mark(folder, suffix):
    file = write(folder / f"train.{suffix}", GOOD)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load("vqa", train_file=file)["train"]["question"][0] == "what?"


def test_a_changed_file_is_read_again(folder):
    for answer in ("red", "blue"):
        file = write(folder / "train.jsonl", [{**GOOD[0], "answer": answer}])
        (row,) = load("vqa", train_file=file)["train"]
        assert row["answers"] == [answer]


def test_image_root(folder):
    (folder / "annotations").mkdir()
    file = write(folder / "annotations" / "val.json", GOOD)
    assert list(load("vqa", validation_file=file, image_root=folder)) == ["validation"]
    with pytest.raises(ValueError, match="val.json row 3"):
        load("vqa", validation_file=file)


def test_files_that_cannot_be_read(folder):
    (folder / "folder.jsonl").mkdir()
    for name in ("none.json", "folder.jsonl"):
        with pytest.raises(FileNotFoundError, match=name):
            load("vqa", train_file=folder / name)
    contents = {
        "a.doc": b"",
        "b.json": b"[{]",
        "c.parquet": b"x",
        "d.csv": b"image\n\x81",
        "e.jsonl": b'{"image": "\xff"}',
        "f.json": b"[" * 100_000,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} .*[cC]onvert"):
            load("vqa", train_file=folder / name)
    with pytest.raises(ValueError, match="empty.jsonl"):
        load("vqa", train_file=write(folder / "empty.jsonl", []))


@pytest.mark.parametrize(
    "task, given, option",
    [
        ("vqa", {"image_root": "."}, "image_root"),
        ("nlvr2", {"grid": 1}, "grid"),
        ("vqa", {"validation_split": "test"}, "validation_split"),
        ("vqa", {"train_file": __file__, "train_split": "val"}, "train_split"),
    ],
)
def test_contradicting_arguments(task, given, option):
    with pytest.raises(ValueError, match=option):
        load(task, **given)


# Encoded images: Parquet, and data sets on the Hub (replaced by a local folder) or on disk


ENCODED = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})


@pytest.mark.parametrize("image_type", [ENCODED, pyarrow.binary(), pyarrow.large_binary()], ids=str)
def test_parquet_with_encoded_images(folder, image_type):
    """Pandas, Spark and img2dataset write plain bytes. Rows with equal bytes share their image."""
    file = folder / "train.parquet"
    a, b = (encoded(folder / name) if image_type is ENCODED else (folder / name).read_bytes() for name in IMAGES)
    images = pyarrow.array([a, b, None, a], image_type)
    captions = [["one", "two"], ["three"], ["four"], ["five"]]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "captions": captions}), file)
    with pytest.raises(ValueError, match="row 3: no image"):
        load("captions", train_file=file)
    rows = load("captions", train_file=file, skip_bad_rows=True)["train"]
    assert rows["caption"][:] == ["one", "two", "three", "five"]
    first, second, other, third = rows["image_id"]
    assert first == second == third != other
    assert rows[2]["image"].tobytes() == Image.open(folder / "b.png").tobytes()

    pairs = pyarrow.array([[a, b], [b, a]], pyarrow.list_(image_type))
    pyarrow.parquet.write_table(pyarrow.table({"images": pairs, "statement": ["s", "t"], "label": [0, 1]}), file)
    first, second = load("nlvr2", train_file=file)["train"]
    assert first["image_ids"] == second["image_ids"][::-1]
    assert [image.size for image in (*first["images"], *second["images"])] == [A, B, B, A]


@pytest.fixture
def table(folder):
    columns = {
        "image": [encoded(folder / "a.png")] * 2,
        "question_id": [5, 6],
        "question": ["what?", ""],
        "answers": [[{"answer": "red", "answer_id": 0}] * 10, [{"answer": "no", "answer_id": 0}]],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_hub(folder, table):
    repository = folder / "repository"
    repository.mkdir()
    table.select([0]).to_parquet(repository / "train-0.parquet")
    table.to_parquet(repository / "validation-0.parquet")
    name = str(repository)
    with pytest.raises(ValueError, match="repository validation row 2: no question"):
        load("vqa", name)
    for split, rows in load("vqa", name, skip_bad_rows=True).items():
        assert rows.features == TASKS["vqa"].features
        (row,) = rows
        assert row["source"] == f"{name} {split} row 1"
        assert row["question_id"] == "5"
        assert row["answers"] == ["red"] * 10
        assert row["image"].size == A

    swapped = load("vqa", name, train_split="validation", validation_split="train", skip_bad_rows=True)
    assert swapped["train"]["source"][0] == f"{name} validation row 1"
    with pytest.raises(ValueError, match="'testA'.*validation_split"):
        load("vqa", name, validation_split="testA")
    (repository / "train-0.parquet").unlink()
    assert list(load("vqa", name, skip_bad_rows=True)) == ["validation"]


@pytest.mark.parametrize("has_splits", [True, False])
def test_folders_of_save_to_disk(folder, table, has_splits):
    table = table.select([0])
    splits = ["train"]
    if has_splits:
        splits.append("validation")
        table = datasets.DatasetDict(train=table, validation=table)
    table.save_to_disk(folder / "saved")
    assert list(load("vqa", str(folder / "saved"))) == splits


# Bad rows

COLLATORS = {
    "vqa": [VqaCollator, partial(VqaCollator, training=True)],
    "captions": [CaptionCollator, partial(CaptionCollator, training=True), RetrievalCollator],
    "nlvr2": [Nlvr2Collator],
    "grounding": [GroundingCollator],
}
each_task = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(scope="module")
def processor():
    return make_processor(tokenizer(), TripsConfig.from_preset("tiny"))


def write_bad(folder, task, rows):
    """Write a file with a good row 1, followed by the bad rows."""
    lines = [json.dumps(GOOD_ROWS[task])]
    lines += [row.line for row in rows]
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines))
    return str(file)


def expected(rows, *found):
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
    source = DataArguments(train_file=write_bad(folder, task, rows))
    faults = []
    data = load_task_dataset(task, source, patch_size=PATCH_SIZE, faults=faults)
    assert {fault.source: fault.reason for fault in faults} == expected(rows, "reading")
    with pytest.raises(ValueError, match=f"{len(faults)} of the {len(rows) + 1} rows of rows.jsonl") as raised:
        load_task_dataset(task, source, patch_size=PATCH_SIZE)
    for fault in faults[:5]:
        assert str(fault) in str(raised.value)

    unfit = expected(rows, "tokenizer")
    with pytest.raises(ValueError, match=f"{len(unfit)} of the .* rows of train") as raised:
        with_fitting_texts(data, task, processor, skip=False)
    for place, reason in unfit.items():
        assert f"{place}: {reason} (" in str(raised.value)
    data = with_fitting_texts(data, task, processor, skip=True)
    assert data["train"]["source"][:] == ["rows.jsonl row 1"]
    assert collate(processor, task, data["train"]) == {}


def test_a_repaired_or_damaged_image_is_checked_again(folder):
    """The rows are the same, and their result is cached."""
    good = GOOD_ROWS["vqa"]
    file = write(folder / "rows.jsonl", [good, {**good, "image": "good.jpg"}])
    whole = (folder / "good.jpg").read_bytes()
    for content, num_faults in ((b"damaged", 1), (whole, 0), (b"damaged", 1)):
        (folder / "good.jpg").write_bytes(content)
        faults = []
        load_task_dataset("vqa", DataArguments(train_file=str(file)), faults=faults)
        assert len(faults) == num_faults


@each_task
def test_check_data_names_them_all_in_the_same_words(task, folder, processor):
    rows = bad_rows(task)
    processor.save_pretrained(folder / "checkpoint")
    source = DataArguments(train_file=write_bad(folder, task, rows))
    faults, _ = check_data.check(task, ModelArguments(tokenizer=str(folder / "checkpoint")), source)
    assert {fault.source: fault.reason for fault in faults} == expected(rows, "reading", "tokenizer")


def test_a_stream_names_them_all_in_the_same_words(folder, processor):
    rows = bad_rows("captions")
    shards = find_shards([write_bad(folder, "captions", rows)])
    stream = PairStream(shards, processor=processor, max_bad_share=1.0, log_folder=folder)
    pairs = list(islice(stream, 2))  # the second pass begins after all rows
    assert [pair["source"] for pair in pairs] == ["rows.jsonl row 1"] * 2
    named = {}
    for line in (folder / "bad_pairs-00000.jsonl").read_text().splitlines():
        pair = json.loads(line)
        named[pair["source"]] = pair["error"].partition(" (")[0]
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
    record = st.dictionaries(columns, values, max_size=4).map(lambda changed: {**GOOD_ROWS[task], **changed})

    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(st.lists(record, max_size=6))
    def check(rows):
        file = folder / "random.jsonl"
        file.write_text("\n".join(map(json.dumps, [GOOD_ROWS[task], *rows])))
        data = load_task_dataset(task, DataArguments(train_file=str(file)), patch_size=PATCH_SIZE, faults=[])
        assert len(data["train"]) >= 1
        data = with_fitting_texts(data, task, processor, skip=True)
        assert collate(processor, task, data["train"]) == {}

    check()
