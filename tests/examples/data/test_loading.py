"""Loading of each task from files, Parquet, folders and data sets. test_checking.py has each kind of bad row."""

import json
import re

import datasets
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
from loading import encoded, load, write

from trips_examples.data.tasks import TASKS


# Sizes of the images in `folder`
A, B = (4, 3), (32, 32)
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
            "question": ["what?", "how many?", "where?"],
            "answers": [["red"], ["2", "two"], ["3"]],
            "region": [[0.0, 1.0, 3.5, 3.0], None, None],
            "question_id": ["1", "2", "q9"],
            "image_id": ["{folder}/a.png", "{folder}/a.png", "8"],
            "source": [1, 2, 3],
            "image": [A, A, B],
        },
    ),
    "captions": (
        [{"image": "a.png", "caption": "one"}, {"image": "b.png", "captions": ["two", "three"], "image_id": 7}],
        {
            "caption": ["one", "two", "three"],
            "image_id": ["{folder}/a.png", "7", "7"],
            "source": [1, 2, 2],
            "image": [A, B, B],
        },
    ),
    "nlvr2": (
        [
            {"left_image": "a.png", "right_image": "b.png", "statement": "left", "label": "True"},
            {
                "images": ["b.png", "a.png"],
                "statement": "right",
                "label": 0.0,  # as pandas writes labels where one is missing
                "image_ids": ["x", "y"],
                "question_id": "q",
            },
        ],
        {
            "label": [1, 0],
            "question_id": ["1", "q"],
            "image_ids": [["{folder}/a.png", "{folder}/b.png"], ["x", "y"]],
            "source": [1, 2],
            "images": [[A, B], [B, A]],
        },
    ),
    "grounding": (
        [
            {"image": "a.png", "expression": "a dog", "box": [0, 1, 3.5, 3]},
            {"image": "b.png", "expression": "it", "box": [-0.5, 0, 32.5, 31], "question_id": "q"},
        ],
        {
            "box": [[0, 1, 3.5, 3], [0, 0, 32, 31]],  # cut to the image
            "question_id": ["1", "q"],
            "source": [1, 2],
            "image": [A, B],
        },
    ),
}
BAD = {
    "missing image": {"image": "none.png", "question": "what?", "answer": "red"},
    "unreadable image": {"image": "text.png", "question": "what?", "answer": "red"},
    "no image": {"question": "what?", "answer": "red"},
    "no question": {"image": "a.png", "question": " ", "answer": "red"},
    "no answer": {"image": "a.png", "question": "what?", "answers": [""]},
    "image_id of two images": {"image": "a.png", "question": "what?", "answer": "red", "image_id": 8},
}


def in_folder(value, folder):
    return [in_folder(each, folder) for each in value] if isinstance(value, list) else value.format(folder=folder)


@pytest.mark.parametrize("task", FILES)
def test_file_of_each_format(folder, suffix, task):
    records, expected = FILES[task]
    file = write(folder / f"train.{suffix}", records)
    loaded = load(task, train_file=file, validation_file=str(file))
    assert list(loaded) == ["train", "validation"]
    rows = loaded["train"]
    assert rows.features == TASKS[task].features
    columns = {name: rows[name][:] for name in expected if not name.startswith("image")}
    numbers = [f"train.{suffix} row {number}" for number in expected["source"]]
    assert columns == {name: expected[name] for name in columns} | {"source": numbers}
    for name in expected.keys() & {"image_id", "image_ids"}:
        assert rows[name][:] == in_folder(expected[name], folder)
    if task == "nlvr2":
        assert [[image.size for image in pair] for pair in rows["images"]] == expected["images"]
    else:
        assert [image.size for image in rows["image"]] == expected["image"]
        assert rows[0]["image"].mode == "L"  # as it is stored
        assert rows[-1]["image"].tobytes() == PIL.Image.open(folder / "b.png").tobytes()


def test_bad_rows_are_named_or_skipped_and_counted(folder, suffix, caplog):
    bad = list(BAD.values())
    file = write(folder / f"train.{suffix}", [bad[0], GOOD[0], *bad, GOOD[2], bad[-1]])
    with pytest.raises(ValueError, match=f"7 of the 10 rows of train.{suffix}") as raised:
        load("vqa", train_file=file)
    named = re.findall(rf"train.{suffix} row (\d+): ([a-z ]+) \(", str(raised.value))
    assert named == [
        ("1", "missing image"),
        *((str(row), reason) for row, reason in enumerate(list(BAD)[:4], start=3)),
    ]
    assert "and 2 more" in str(raised.value) and "--skip_bad_rows" in str(raised.value)
    rows = load("vqa", train_file=file, skip_bad_rows=True)["train"]
    # Row 9 has the image_id of row 8 for another image, so row 9 is bad.
    assert rows["source"][:] == [f"train.{suffix} row {number}" for number in (2, 8, 10)]
    assert f"Skipped 7 of the 10 rows of train.{suffix} (missing image: 2; " in caplog.text.replace(", ", "; ")
    for reason in list(BAD)[1:]:
        assert f"{reason}: 1" in caplog.text


STRAY = "a.png,what?,red\na.png,{}\na.png,why?,blue\na.png,{}\na.png,who?,red\n"


@pytest.mark.parametrize(
    ("rows", "number"),
    [
        ("a.png,what, then?,red\n", 1),  # `datasets.load_dataset` shifts all columns if every row has a comma
        ("a.png,what?,red\na.png,what, then?,red\n", 2),
        (STRAY.format('how?,"red', "where?,red"), 2),  # a quote that no other one closes
        (STRAY.format('how?,"red', 'where?,red"'), 2),
        (STRAY.format('"how?,red', 'where" is it?,red'), 2),
    ],
)
def test_rows_of_csv_that_quotes_or_commas_swallow_are_named(folder, rows, number):
    (folder / "train.csv").write_text(f"image,question,answer\n{rows}")
    with pytest.raises(ValueError, match=f"train.csv .*row {number}"):
        load("vqa", train_file=folder / "train.csv", skip_bad_rows=True)
    (folder / "last.csv").write_text('question,answer,image\nwhat?,"red,a.png\nwhy?,blue,a.png\nhow?,red",a.png\n')
    with pytest.raises(ValueError, match="last.csv .*row 1"):
        load("vqa", train_file=folder / "last.csv", skip_bad_rows=True)


def test_names_that_occur_twice_are_refused(folder):
    (folder / "train.csv").write_text("image,question,answer,answer\na.png,what?,red,blue\n")
    (folder / "train.json").write_text('[{"image": "a.png", "question": "what?", "answer": "red", "answer": "blue"}]')
    for name in ("train.csv", "train.json"):
        with pytest.raises(ValueError, match=f"{name}.*'answer'"):
            load("vqa", train_file=folder / name, skip_bad_rows=True)


def test_one_image_in_two_spellings_of_its_path(folder):
    rows = load("vqa", train_file=write(folder / "t.jsonl", [{**GOOD[0], "image": x} for x in ("a.png", "./a.png")]))
    assert len(set(rows["train"]["image_id"])) == 1


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
        rows = load("vqa", train_file=write(folder / "train.jsonl", [{**GOOD[0], "answer": answer}]))
        assert rows["train"]["answers"][0] == [answer]


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
    contents = {"a.txt": "", "b.json": "[{]", "c.parquet": "x", "d.csv": "image\n\xff", "e.jsonl": '{"image": "\xff"}'}
    for name, content in contents.items():
        (folder / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=f"{name} .*[cC]onvert"):
            load("vqa", train_file=folder / name)
    with pytest.raises(ValueError, match="empty.jsonl"):
        load("vqa", train_file=write(folder / "empty.jsonl", []))


@pytest.mark.parametrize(
    ("task", "given", "option"),
    [
        ("vqa", {"image_root": "."}, "image_root"),
        ("nlvr2", {"grid": 1}, "grid"),
        ("vqa", {"validation_split": "test"}, "validation_split"),
    ],
)
def test_contradicting_arguments(task, given, option):
    with pytest.raises(ValueError, match=option):
        load(task, **given)


# Encoded images: Parquet, and data sets on the Hub (replaced by a local folder) or on disk


@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary"])
def test_parquet_with_encoded_images(folder, kind):
    """Pandas, Spark and img2dataset write plain bytes. Rows with equal bytes share their image."""
    struct = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    kind_of = {"struct": struct, "binary": pyarrow.binary(), "large_binary": pyarrow.large_binary()}[kind]
    a, b = ((folder / name).read_bytes() for name in ("a.png", "b.png"))
    if kind == "struct":
        a, b = ({"bytes": content, "path": None} for content in (a, b))
    file = folder / "train.parquet"
    captions = {"captions": [["one", "two"], ["three"], ["four"], ["five"]]}
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array([a, b, None, a], kind_of), **captions}), file)
    with pytest.raises(ValueError, match="row 3: no image"):
        load("captions", train_file=file)
    rows = load("captions", train_file=file, skip_bad_rows=True)["train"]
    assert rows.features == TASKS["captions"].features
    assert rows["caption"][:] == ["one", "two", "three", "five"]
    first, second, other, third = rows["image_id"]
    assert first == second == third != other
    assert rows["source"][:] == [f"train.parquet row {number}" for number in (1, 1, 2, 4)]
    assert [(image.size, image.mode) for image in rows["image"]][1:] == [(A, "L"), (B, "RGB"), (A, "L")]
    assert rows[2]["image"].tobytes() == PIL.Image.open(folder / "b.png").tobytes()

    left, right = (pyarrow.array(each, kind_of) for each in ([a, b], [b, a]))
    both = pyarrow.array([[a, b], [b, a]], pyarrow.list_(kind_of))
    for columns in ({"images": both}, {"left_image": left, "right_image": right}):
        pyarrow.parquet.write_table(pyarrow.table({**columns, "statement": ["s", "t"], "label": [0, 1]}), file)
        rows = load("nlvr2", train_file=file)["train"]
        assert rows.features == TASKS["nlvr2"].features
        assert rows[0]["image_ids"] == rows[1]["image_ids"][::-1]
        assert [[image.size for image in pair] for pair in rows["images"]] == [[A, B], [B, A]]


@pytest.fixture
def table(folder):
    answers = [[{"answer": "red", "answer_id": i} for i in range(10)], [{"answer": "no", "answer_id": 0}]]
    columns = {"question_id": [5, 6], "question": ["what?", ""], "answers": answers}
    images = [encoded(folder / "a.png")] * 2
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())


def test_hub(folder, table):
    (folder / "repository").mkdir()
    table.select([0]).to_parquet(folder / "repository" / "train-0.parquet")
    table.to_parquet(folder / "repository" / "validation-0.parquet")
    name = str(folder / "repository")
    with pytest.raises(ValueError, match="repository validation row 2: no question"):
        load("vqa", name)
    loaded = load("vqa", name, skip_bad_rows=True)
    for split, rows in loaded.items():
        assert rows.features == TASKS["vqa"].features
        assert rows["source"][:] == [f"{name} {split} row 1"]
        assert (rows[0]["question_id"], rows[0]["answers"], rows[0]["image"].size) == ("5", ["red"] * 10, A)
    with pytest.raises(ValueError, match="caption.*'vqa'"):
        load("captions", name)

    swapped = load("vqa", name, train_split="validation", validation_split="train", skip_bad_rows=True)
    assert swapped["train"]["source"][0] == f"{name} validation row 1"
    with pytest.raises(ValueError, match="'testA'.*validation_split"):
        load("vqa", name, validation_split="testA")
    (folder / "repository" / "train-0.parquet").unlink()
    assert list(load("vqa", name, skip_bad_rows=True)) == ["validation"]


@pytest.mark.parametrize("has_splits", [True, False])
def test_folders_of_save_to_disk(folder, table, has_splits):
    table = datasets.concatenate_datasets([table.select([0])] * 2)
    saved = datasets.DatasetDict(train=table, validation=table) if has_splits else table
    saved.save_to_disk(folder / "saved")
    loaded = load("vqa", str(folder / "saved"))
    assert list(loaded) == (["train", "validation"] if has_splits else ["train"])
    (image_id,) = {image_id for rows in loaded.values() for image_id in rows["image_id"]}
    assert image_id


def test_imagefolder(folder):
    (folder / "images" / "train").mkdir(parents=True)
    (folder / "a.png").rename(folder / "images" / "train" / "a.png")
    (folder / "images" / "train" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "caption": "one"}))
    (row,) = load("captions", str(folder / "images"))["train"]
    assert (row["caption"], row["image"].size) == ("one", A)
