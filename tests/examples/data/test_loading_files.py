"""Questions in files of each format: rows, bad rows and bad files."""

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
from trips_examples.data.tasks import VQA_FEATURES


GOOD = [
    {"image": "a.png", "question": "what?", "answer": "red"},
    {"image": "a.png", "question": "how many?", "answers": ["2", "two"]},
    {"image": "b.png", "question": "where?", "answer": 3, "image_id": 8, "question_id": "q9"},
]
BAD = {
    "missing image": {"image": "none.png", "question": "what?", "answer": "red"},
    "unreadable image": {"image": "text.png", "question": "what?", "answer": "red"},
    "no image": {"question": "what?", "answer": "red"},
    "no question": {"image": "a.png", "question": " ", "answer": "red"},
    "no answer": {"image": "a.png", "question": "what?", "answers": [""]},
    "image_id of two images": {"image": "a.png", "question": "what?", "answer": "red", "image_id": 8},
}


def test_file_of_each_format(folder, suffix):
    file = write(folder / f"train.{suffix}", GOOD)
    loaded = load("vqa", train_file=file, validation_file=str(file))
    assert list(loaded) == ["train", "validation"]
    rows = loaded["train"]
    assert rows.features == VQA_FEATURES
    assert rows["question"][:] == ["what?", "how many?", "where?"]
    assert rows["answers"][:] == [["red"], ["2", "two"], ["3"]]
    assert rows["question_id"][:] == ["1", "2", "q9"]
    assert rows["source"][:] == [f"train.{suffix} row {number}" for number in (1, 2, 3)]
    assert rows["image_id"][0] == rows["image_id"][1] != rows["image_id"][2] == "8"
    assert (rows[0]["image"].size, rows[0]["image"].mode) == ((4, 3), "L")  # as it is stored
    assert rows[2]["image"].tobytes() == PIL.Image.open(folder / "b.png").tobytes()


@pytest.mark.parametrize("reason", BAD)
def test_bad_row_is_named(folder, suffix, reason):
    file = write(folder / f"train.{suffix}", [*GOOD, BAD[reason]])
    with pytest.raises(ValueError, match=f"train.{suffix} row 4: {reason}") as raised:
        load("vqa", train_file=file)
    assert "1 of the 4 rows" in str(raised.value)
    assert "--skip_bad_rows" in str(raised.value)


def test_bad_rows_are_skipped_and_counted(folder, suffix, caplog):
    bad = list(BAD.values())
    file = write(folder / f"train.{suffix}", [bad[0], GOOD[0], *bad, GOOD[2], bad[-1]])
    with caplog.at_level(logging.WARNING):
        rows = load("vqa", train_file=file, skip_bad_rows=True)["train"]
    # Row 9 has the image_id of row 8 for another image, so row 9 is bad.
    assert rows["source"][:] == [f"train.{suffix} row {number}" for number in (2, 8, 10)]
    assert f"Skipped 7 of the 10 rows of train.{suffix} (missing image: 2; " in caplog.text.replace(", ", "; ")
    for reason in list(BAD)[1:]:
        assert f"{reason}: 1" in caplog.text


def test_many_bad_rows_are_counted(folder):
    file = write(folder / "train.jsonl", [BAD["missing image"]] * 7 + GOOD)
    with pytest.raises(ValueError, match="7 of the 10 rows") as raised:
        load("vqa", train_file=file)
    named = [int(number) for number in re.findall(r"row (\d+):", str(raised.value))]
    assert named == [1, 2, 3, 4, 5]
    assert "and 2 more" in str(raised.value)


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
    assert "Skipped 3 of the 5 rows" in caplog.text


def test_unquoted_comma_in_csv_is_named(folder):
    file = folder / "train.csv"
    file.write_text(",image,question,answer\n0,a.png,what?,red\n1,a.png,what, then?,red\n")
    with pytest.raises(ValueError, match="train.csv row 2: more cells"):
        load("vqa", train_file=file)


def test_answers_in_csv(folder):
    file = folder / "train.csv"
    file.write_text('image,question,answers\na.png,what?,"[""red|blue"", ""gray""]"\na.png,what?,red | blue|\n')
    assert load("vqa", train_file=file)["train"]["answers"][:] == [["red|blue", "gray"], ["red", "blue"]]
    file.write_text('image,question,answers\na.png,what?,"[red"\n')
    with pytest.raises(ValueError, match="row 1: answers"):
        load("vqa", train_file=file)


def test_answers_that_are_not_text(folder):
    file = write(folder / "train.jsonl", [{**GOOD[0], "answer": True}, {**GOOD[0], "answers": 5}])
    with pytest.raises(ValueError, match="row 1: an answer .*\n.*row 2: answers"):
        load("vqa", train_file=file)


def test_truncated_image_is_found_where_rows_are_skipped(folder, caplog):
    image = folder / "b.jpg"
    PIL.Image.open(folder / "b.png").save(image)
    image.write_bytes(image.read_bytes()[:-200])
    file = write(folder / "train.jsonl", [GOOD[0], {**GOOD[0], "image": "b.jpg"}])
    assert len(load("vqa", train_file=file, skip_bad_rows=True)["train"]) == 1
    assert "unreadable image: 1" in caplog.text


def test_damaged_image_is_found_without_decoding_it(folder):
    content = bytearray((folder / "b.png").read_bytes())
    content[-40] ^= 1
    (folder / "b.png").write_bytes(content)
    with pytest.raises(ValueError, match="row 3: unreadable image .*b.png"):
        load("vqa", train_file=write(folder / "train.jsonl", GOOD))


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
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load("vqa", validation_file=file, image_root=folder / "nowhere")


def test_files_that_cannot_be_read(folder):
    with pytest.raises(FileNotFoundError, match="none.json"):
        load("vqa", train_file=folder / "none.json")
    for name, content in {"a.txt": "", "b.json": "[{]", "c.parquet": "x", "d.csv": "image\n\xff"}.items():
        (folder / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=f"{name} .*[cC]onvert"):
            load("vqa", train_file=folder / name)
    with pytest.raises(ValueError, match="empty.jsonl"):
        load("vqa", train_file=write(folder / "empty.jsonl", []))


def test_a_folder_is_no_file(folder):
    (folder / "train.jsonl").mkdir()
    with pytest.raises(FileNotFoundError, match="train.jsonl"):
        load("vqa", train_file=folder / "train.jsonl")


@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_of_rows_is_named(folder, indent):
    (folder / "train.json").write_text(json.dumps({"data": GOOD}, indent=indent))
    with pytest.raises(ValueError, match="train.json row 1"):
        load("vqa", train_file=folder / "train.json")


def test_one_object_on_one_line_is_a_record(folder):
    (folder / "train.json").write_text(json.dumps(GOOD[0]))
    assert load("vqa", train_file=folder / "train.json")["train"]["question"][:] == ["what?"]


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
    decodes = []
    for name in names:
        try:
            PIL.Image.open(folder / name).load()
            decodes.append(name)
        except OSError:
            pass
    file = write(folder / "train.jsonl", [{**GOOD[0], "image": name} for name in names])
    faults = []
    rows = load_task_dataset("vqa", DataSource(train_file=file), BadRows(image_check="verify", collected=faults))
    assert [Path(name).name for name in rows["train"]["image_id"]] == decodes == ["whole.jpg", "junk.jpg"]
    assert [fault.detail.partition(": ")[2] for fault in faults] == ["image file is truncated"] * 2


def test_unknown_task():
    with pytest.raises(ValueError, match="ocr"):
        load("ocr")


def test_contradicting_arguments(folder):
    with pytest.raises(ValueError, match="dataset_name"):
        load("vqa", "easy_vqa", train_file=folder / "a.json")
    with pytest.raises(ValueError, match="image_root"):
        load("vqa", image_root=folder)
    with pytest.raises(ValueError, match="captions"):
        load("captions", "easy_vqa")
    with pytest.raises(ValueError, match="validation_split"):
        load("vqa", validation_split="test")
