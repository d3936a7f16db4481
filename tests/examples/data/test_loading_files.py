"""Files of each task and format: rows, bad rows and bad files. test_bad_rows.py has each kind of bad row."""

import io
import json
import logging
import re
from pathlib import Path

import PIL.Image
import pytest
from loading import load, write

from trips_examples.data.faults import BadRows
from trips_examples.data.loading import load_task_dataset
from trips_examples.data.source import DataSource
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
    with caplog.at_level(logging.WARNING):
        rows = load("vqa", train_file=file, skip_bad_rows=True)["train"]
    # Row 9 has the image_id of row 8 for another image, so row 9 is bad.
    assert rows["source"][:] == [f"train.{suffix} row {number}" for number in (2, 8, 10)]
    assert f"Skipped 7 of the 10 rows of train.{suffix} (missing image: 2; " in caplog.text.replace(", ", "; ")
    for reason in list(BAD)[1:]:
        assert f"{reason}: 1" in caplog.text


def test_bad_regions_are_named(folder):
    records = [{**GOOD[0], "region": region} for region in ([0, 0, 5.5, 3], [1])]
    with pytest.raises(ValueError, match="(?s)region outside the image .* is 4 x 3.*region is not four numbers"):
        load("vqa", train_file=write(folder / "train.jsonl", records))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_broken_line_is_named(folder, suffix, caplog):
    lines = [json.dumps(GOOD[0]), "", '{"image": "a.png", "question', "3", "\ufffd", json.dumps(GOOD[1])]
    file = folder / f"train.{suffix}"
    file.write_bytes("\n".join(lines).encode().replace("\ufffd".encode(), b'"\xff"'))
    with pytest.raises(ValueError, match="3 of the 5 rows") as raised:
        load("vqa", train_file=file)
    for fault in ("row 3: broken JSON", "row 4: not a JSON object", "row 5: not UTF-8"):
        assert f"train.{suffix} {fault}" in str(raised.value)
    rows = load("vqa", train_file=file, skip_bad_rows=True)["train"]
    assert rows["source"][:] == [f"train.{suffix} row 1", f"train.{suffix} row 6"]


def test_unquoted_comma_in_csv_is_named(folder):
    file = folder / "train.csv"
    file.write_text(",image,question,answer\n0,a.png,what?,red\n1,a.png,what, then?,red\n")
    with pytest.raises(ValueError, match="train.csv row 2: more cells"):
        load("vqa", train_file=file)


def test_answers_in_csv(folder):
    file = folder / "train.csv"
    file.write_text('image,question,answers\na.png,what?,"[""red|blue"", ""gray""]"\na.png,what?,red | blue|\n')
    assert load("vqa", train_file=file)["train"]["answers"][:] == [["red|blue", "gray"], ["red", "blue"]]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_byte_order_mark(folder, suffix):
    file = write(folder / f"train.{suffix}", GOOD)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load("vqa", train_file=file)["train"]["question"][0] == "what?"


def test_each_image_is_opened_once(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(PIL.Image, "open", lambda path, _open=PIL.Image.open: opened.append(path[-5:]) or _open(path))
    load("vqa", train_file=write(folder / "train.jsonl", GOOD))
    assert sorted(opened) == ["a.png", "b.png"]


def test_image_root(folder):
    annotations = folder / "annotations"
    annotations.mkdir()
    file = write(annotations / "val.json", GOOD)
    assert list(load("vqa", validation_file=file, image_root=folder)) == ["validation"]
    with pytest.raises(ValueError, match="val.json row 3"):
        load("vqa", validation_file=file)


def test_files_that_cannot_be_read(folder):
    (folder / "folder.jsonl").mkdir()
    for name in ("none.json", "folder.jsonl"):
        with pytest.raises(FileNotFoundError, match=name):
            load("vqa", train_file=folder / name)
    for name, content in {"a.txt": "", "b.json": "[{]", "c.parquet": "x", "d.csv": "image\n\xff"}.items():
        (folder / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=f"{name} .*[cC]onvert"):
            load("vqa", train_file=folder / name)
    with pytest.raises(ValueError, match="empty.jsonl"):
        load("vqa", train_file=write(folder / "empty.jsonl", []))


def test_one_object_is_a_record(folder):
    file = folder / "train.json"
    file.write_text(json.dumps(GOOD[0]))
    assert load("vqa", train_file=file)["train"]["question"][:] == ["what?"]
    file.write_text(json.dumps({"data": GOOD}, indent=1))
    with pytest.raises(ValueError, match="train.json row 1"):
        load("vqa", train_file=file)


def test_a_jpeg_is_checked_for_its_end_without_decoding_it(folder):
    """Bytes after the end, as phones write them, are accepted. The end marker of a thumbnail does not count."""
    image, thumbnail = PIL.Image.open(folder / "b.png"), io.BytesIO()
    image.save(thumbnail, "JPEG")
    exif = PIL.Image.Exif()
    exif[0x9286] = thumbnail.getvalue()
    image.save(folder / "whole.jpg", exif=exif)
    content = (folder / "whole.jpg").read_bytes()
    assert content.count(b"\xff\xd9") == 2
    (folder / "junk.jpg").write_bytes(content + b"junk" * 1000)
    (folder / "endless.jpg").write_bytes(content[:-2])
    (folder / "cut.jpg").write_bytes(content[:-200])
    names = ["whole.jpg", "junk.jpg", "endless.jpg", "cut.jpg"]
    file = write(folder / "train.jsonl", [{**GOOD[1], "image": name} for name in names])
    faults = []
    rows = load_task_dataset("vqa", DataSource(train_file=file), BadRows(image_check="verify", collected=faults))
    assert [Path(name).name for name in rows["train"]["image_id"]] == ["whole.jpg", "junk.jpg"]
    assert [fault.detail.partition(": ")[2] for fault in faults] == ["image file is truncated"] * 2


def test_contradicting_arguments(folder):
    with pytest.raises(ValueError, match="image_root"):
        load("vqa", image_root=folder)
    with pytest.raises(ValueError, match="captions"):
        load("captions", "easy_vqa")
    with pytest.raises(ValueError, match="validation_split"):
        load("vqa", validation_split="test")
