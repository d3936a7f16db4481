"""Data sets for the examples: easy-VQA and its scenes checked against pixels, bad rows in every format, tokenizer."""

import csv
import json
import logging
import re
import sys
from collections import Counter

import datasets
import numpy as np
import PIL.Image
import pytest
from test_scenes import color_and_shape

from trips_examples.data.loading import load_task_dataset
from trips_examples.data.scenes import EASY_VQA_COLORS, EASY_VQA_SHAPES, scene_records
from trips_examples.data.tasks import SCENE_FEATURES, TASKS, VQA_FEATURES


# easy-VQA


@pytest.fixture(scope="module")
def easy_vqa_dataset():
    pytest.importorskip("easy_vqa")
    return load_task_dataset("vqa")


def test_easy_vqa_has_its_official_split(easy_vqa_dataset):
    assert list(easy_vqa_dataset) == ["train", "validation"]
    counts = {"train": (38575, 4000), "validation": (9673, 1000)}
    for split, (questions, images) in counts.items():
        rows = easy_vqa_dataset[split]
        assert (len(rows), len(set(rows["image_id"]))) == (questions, images)
        assert {answer for answers in rows["answers"] for answer in answers} == {
            *EASY_VQA_COLORS,
            *EASY_VQA_SHAPES,
            "yes",
            "no",
        }
    assert not set(easy_vqa_dataset["train"]["image_id"]) & set(easy_vqa_dataset["validation"]["image_id"])


def test_easy_vqa_row(easy_vqa_dataset):
    rows = easy_vqa_dataset["validation"]
    assert rows.features == VQA_FEATURES
    row = rows[2]
    assert row["source"] == "easy_vqa test row 3"
    assert (row["image"].size, row["image"].mode) == ((64, 64), "RGB")


def test_easy_vqa_answers_fit_the_pixels(easy_vqa_dataset):
    """Also that each question has got the image it is about."""
    rows = easy_vqa_dataset["train"].select(range(0, 38575, 97))
    seen = Counter()
    for row in rows:
        color, shape = color_and_shape(np.asarray(row["image"]))
        if row["answers"][0] in {"yes", "no"}:
            negated = bool(re.search(r"\b(no|not)\b", row["question"]))
            named = bool({color, shape} & set(re.findall(r"\w+", row["question"])))
            assert row["answers"] == ["yes" if named != negated else "no"], row
        else:
            assert row["answers"][0] in {color, shape}, row
        seen[row["answers"][0]] += 1
    assert len(seen) == 13


def test_missing_easy_vqa_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ImportError, match="pip install easy-vqa"):
        load_task_dataset("vqa", "easy_vqa")


@pytest.mark.parametrize("task", TASKS)
def test_scenes_of_each_task(task):
    pytest.importorskip("easy_vqa")
    loaded = load_task_dataset(task, "easy_vqa_scenes", train_scenes=3, validation_scenes=2, seed=5)
    assert list(loaded) == ["train", "validation"]
    for split, part, number in (("train", "train", 3), ("validation", "test", 2)):
        rows, records = loaded[split], list(scene_records(task, part, number, seed=5))
        assert rows.features == (SCENE_FEATURES if task == "vqa" else TASKS[task].features)
        texts = [row[TASKS[task].text] for row in rows]
        several = [record.get("captions") or [record[TASKS[task].text]] for record in records]
        assert texts == sum(several, [])
        number = 1 + len(texts) // (3 if task == "captions" else 1) - 1
        assert rows[-1]["source"] == f"easy_vqa_scenes {part} row {number}"


# Files

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


@pytest.fixture
def folder(tmp_path):
    PIL.Image.new("L", (4, 3), 200).save(tmp_path / "a.png")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "b.png")
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def write(file, records):
    columns = ["image", "question", "answer", "answers", "image_id", "question_id"]
    if file.suffix == ".json":
        file.write_text(json.dumps(records, indent=1))
    elif file.suffix == ".jsonl":
        file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    elif file.suffix == ".csv":
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, columns)
            writer.writeheader()
            writer.writerows({k: "|".join(v) if isinstance(v, list) else v for k, v in r.items()} for r in records)
    else:
        as_text = {"image", "question", "answer", "image_id", "question_id"}
        table = {c: [str(r[c]) if c in as_text & r.keys() else r.get(c) for r in records] for c in columns}
        datasets.Dataset.from_dict(table).to_parquet(file)
    return file


@pytest.fixture(params=["json", "jsonl", "csv", "parquet"])
def suffix(request):
    return request.param


def test_file_of_each_format(folder, suffix):
    file = write(folder / f"train.{suffix}", GOOD)
    loaded = load_task_dataset("vqa", train_file=file, validation_file=str(file))
    assert list(loaded) == ["train", "validation"]
    rows = loaded["train"]
    assert rows.features == VQA_FEATURES
    assert rows["question"][:] == ["what?", "how many?", "where?"]
    assert rows["answers"][:] == [["red"], ["2", "two"], ["3"]]
    assert rows["question_id"][:] == ["1", "2", "q9"]
    assert rows["source"][:] == [f"train.{suffix} row {number}" for number in (1, 2, 3)]
    assert rows["image_id"][0] == rows["image_id"][1] != rows["image_id"][2] == "8"
    assert (rows[0]["image"].size, rows[0]["image"].mode) == ((4, 3), "RGB")
    assert rows[2]["image"].tobytes() == PIL.Image.open(folder / "b.png").tobytes()


@pytest.mark.parametrize("reason", BAD)
def test_bad_row_is_named(folder, suffix, reason):
    file = write(folder / f"train.{suffix}", [*GOOD, BAD[reason]])
    with pytest.raises(ValueError, match=f"train.{suffix} row 4: {reason}") as raised:
        load_task_dataset("vqa", train_file=file)
    assert "1 of the 4 rows" in str(raised.value)
    assert "--skip_bad_rows" in str(raised.value)


def test_bad_rows_are_skipped_and_counted(folder, suffix, caplog):
    bad = list(BAD.values())
    file = write(folder / f"train.{suffix}", [bad[0], GOOD[0], *bad, GOOD[2], bad[-1]])
    with caplog.at_level(logging.WARNING):
        rows = load_task_dataset("vqa", train_file=file, skip_bad_rows=True)["train"]
    # Row 8 is the first with image_id 8, so row 9, which has it for another image, is the bad one.
    assert rows["source"][:] == [f"train.{suffix} row {number}" for number in (2, 8, 10)]
    assert f"Skipped 7 of the 10 rows of train.{suffix} (missing image: 2; " in caplog.text.replace(", ", "; ")
    for reason in list(BAD)[1:]:
        assert f"{reason}: 1" in caplog.text


def test_many_bad_rows_are_counted(folder):
    file = write(folder / "train.jsonl", [BAD["missing image"]] * 7 + GOOD)
    with pytest.raises(ValueError, match="7 of the 10 rows") as raised:
        load_task_dataset("vqa", train_file=file)
    named = [int(number) for number in re.findall(r"row (\d+):", str(raised.value))]
    assert named == [1, 2, 3, 4, 5]
    assert "and 2 more" in str(raised.value)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_broken_line_is_named(folder, suffix, caplog):
    lines = [json.dumps(GOOD[0]), "", '{"image": "a.png", "question', "3", "\ufffd", json.dumps(GOOD[1])]
    file = folder / f"train.{suffix}"
    file.write_bytes("\n".join(lines).encode().replace("\ufffd".encode(), b'"\xff"'))
    with pytest.raises(ValueError, match="3 of the 5 rows") as raised:
        load_task_dataset("vqa", train_file=file)
    for fault in ("row 3: broken JSON", "row 4: not a JSON object", "row 5: not UTF-8"):
        assert f"train.{suffix} {fault}" in str(raised.value)
    rows = load_task_dataset("vqa", train_file=file, skip_bad_rows=True)["train"]
    assert rows["source"][:] == [f"train.{suffix} row 1", f"train.{suffix} row 6"]
    assert "Skipped 3 of the 5 rows" in caplog.text


def test_unquoted_comma_in_csv_is_named(folder):
    file = folder / "train.csv"
    file.write_text(",image,question,answer\n0,a.png,what?,red\n1,a.png,what, then?,red\n")
    with pytest.raises(ValueError, match="1 of the 2 rows of train.csv.*\n.*row 2: more cells than the header"):
        load_task_dataset("vqa", train_file=file)


def test_answers_in_csv(folder):
    file = folder / "train.csv"
    file.write_text('image,question,answers\na.png,what?,"[""red|blue"", ""gray""]"\na.png,what?,red | blue|\n')
    assert load_task_dataset("vqa", train_file=file)["train"]["answers"][:] == [["red|blue", "gray"], ["red", "blue"]]
    file.write_text('image,question,answers\na.png,what?,"[red"\n')
    with pytest.raises(ValueError, match="row 1: answers is not a JSON list .*'\\[red'"):
        load_task_dataset("vqa", train_file=file)


def test_answers_that_are_not_text(folder):
    file = write(folder / "train.jsonl", [{**GOOD[0], "answer": True}, {**GOOD[0], "answers": 5}])
    with pytest.raises(ValueError, match="row 1: an answer is not text .True.*\n.*row 2: answers is not a list .5"):
        load_task_dataset("vqa", train_file=file)


def test_truncated_image_is_found_where_rows_are_skipped(folder, caplog):
    image = folder / "b.jpg"
    PIL.Image.open(folder / "b.png").save(image)
    image.write_bytes(image.read_bytes()[:-200])
    file = write(folder / "train.jsonl", [GOOD[0], {**GOOD[0], "image": "b.jpg"}])
    assert len(load_task_dataset("vqa", train_file=file, skip_bad_rows=True)["train"]) == 1
    assert "unreadable image: 1" in caplog.text


def test_damaged_image_is_found_without_decoding_it(folder):
    content = bytearray((folder / "b.png").read_bytes())
    content[-40] ^= 1
    (folder / "b.png").write_bytes(content)
    with pytest.raises(ValueError, match="row 3: unreadable image .*b.png"):
        load_task_dataset("vqa", train_file=write(folder / "train.jsonl", GOOD))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_byte_order_mark(folder, suffix):
    file = write(folder / f"train.{suffix}", GOOD)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_task_dataset("vqa", train_file=file)["train"]["question"][0] == "what?"


def test_each_image_is_opened_once(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(PIL.Image, "open", lambda path, _open=PIL.Image.open: opened.append(path[-5:]) or _open(path))
    load_task_dataset("vqa", train_file=write(folder / "train.jsonl", GOOD))
    assert sorted(opened) == ["a.png", "b.png"]


def test_image_root(folder):
    annotations = folder / "annotations"
    annotations.mkdir()
    file = write(annotations / "val.json", GOOD)
    assert list(load_task_dataset("vqa", validation_file=file, image_root=folder)) == ["validation"]
    with pytest.raises(ValueError, match="3 of the 3 rows of val.json"):
        load_task_dataset("vqa", validation_file=file)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        load_task_dataset("vqa", validation_file=file, image_root=folder / "nowhere")


def test_files_that_cannot_be_read(folder):
    with pytest.raises(FileNotFoundError, match="no file .*none.json"):
        load_task_dataset("vqa", train_file=folder / "none.json")
    for name, content in {"a.txt": "", "b.json": "[{]", "c.parquet": "x", "d.csv": "image\n\xff"}.items():
        (folder / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=f"{name} .*[cC]onvert"):
            load_task_dataset("vqa", train_file=folder / name)
    with pytest.raises(ValueError, match="empty.jsonl has no row"):
        load_task_dataset("vqa", train_file=write(folder / "empty.jsonl", []))


# The other tasks

CAPTIONS = [
    {"image": "a.png", "caption": "one"},
    {"image": "b.png", "captions": ["two", "three"], "image_id": 7},
]
STATEMENTS = [
    {"left_image": "a.png", "right_image": "b.png", "statement": "left", "label": "True"},
    {"images": ["b.png", "a.png"], "statement": "right", "label": 0, "image_ids": ["x", "y"], "question_id": "q"},
]
EXPRESSIONS = [
    {"image": "a.png", "expression": "a dog", "box": [0, 1, 3.5, 3]},
    {"image": "b.png", "expression": "it", "box": [-0.5, 0, 32.5, 31], "question_id": "q"},
]
COLUMNS = {
    "captions": ["image", "image_id", "caption", "captions"],
    "nlvr2": ["left_image", "right_image", "images", "image_ids", "question_id", "statement", "label"],
    "grounding": ["image", "expression", "box", "question_id"],
}


def write_columns(file, records, columns):
    """As `write`, with lists as JSON in CSV."""
    if file.suffix == ".csv":
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, columns)
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in records)
    elif file.suffix == ".parquet":
        texts = [{k: v if isinstance(v, list) or v is None else str(v) for k, v in r.items()} for r in records]
        datasets.Dataset.from_dict({c: [r.get(c) for r in texts] for c in columns}).to_parquet(file)
    else:
        write(file, records)
    return file


def test_captions_of_each_format(folder, suffix):
    file = write_columns(folder / f"train.{suffix}", CAPTIONS, COLUMNS["captions"])
    rows = load_task_dataset("captions", train_file=file)["train"]
    assert rows.features == TASKS["captions"].features
    assert rows["caption"][:] == ["one", "two", "three"]
    assert rows["source"][:] == [f"train.{suffix} row {number}" for number in (1, 2, 2)]
    assert rows["image_id"][:] == [str(folder / "a.png"), "7", "7"]
    assert [image.size for image in rows["image"]] == [(4, 3), (32, 32), (32, 32)]


def test_statements_of_each_format(folder, suffix):
    file = write_columns(folder / f"train.{suffix}", STATEMENTS, COLUMNS["nlvr2"])
    rows = load_task_dataset("nlvr2", train_file=file)["train"]
    assert rows.features == TASKS["nlvr2"].features
    assert rows["label"][:] == [1, 0]
    assert rows["question_id"][:] == ["1", "q"]
    assert rows["image_ids"][:] == [[str(folder / "a.png"), str(folder / "b.png")], ["x", "y"]]
    assert [[image.size for image in pair] for pair in rows["images"]] == [[(4, 3), (32, 32)], [(32, 32), (4, 3)]]
    assert rows[0]["images"][0].mode == "RGB"


def test_expressions_of_each_format(folder, suffix):
    file = write_columns(folder / f"train.{suffix}", EXPRESSIONS, COLUMNS["grounding"])
    rows = load_task_dataset("grounding", train_file=file)["train"]
    assert rows.features == TASKS["grounding"].features
    assert rows["box"][:] == [[0, 1, 3.5, 3], [0, 0, 32, 31]]  # cut to the image
    assert rows["question_id"][:] == ["1", "q"]


BAD_OF_TASK = [
    ("captions", {"image": "a.png", "caption": " "}, "no caption"),
    ("captions", {"image": "a.png", "caption": ["one", ""]}, "an empty caption .number 2 of 2"),
    ("captions", {"image": "a.png", "caption": ["one", {"raw": "two"}]}, "a caption is not text"),
    ("nlvr2", {"images": ["a.png"], "statement": "s", "label": 1}, "not two images"),
    ("nlvr2", {"left_image": "a.png", "statement": "s", "label": 1}, "no image"),
    ("nlvr2", {"images": ["a.png", "none.png"], "statement": "s", "label": 1}, "missing image"),
    ("nlvr2", {"images": ["a.png", "b.png"], "statement": "s", "label": 2}, "label is not 1, 0, true or false .2"),
    ("nlvr2", {"images": ["a.png", "b.png"], "statement": "s"}, "no label"),
    ("nlvr2", {"images": ["a.png", "b.png"], "label": 1}, "no statement"),
    ("nlvr2", {"images": ["a.png", "b.png"], "image_ids": ["x"], "statement": "s", "label": 1}, "not two image_ids"),
    (
        "nlvr2",
        {"images": ["a.png", "b.png"], "image_ids": ["x", "x"], "statement": "s", "label": 1},
        "image_id of two",
    ),
    ("grounding", {"image": "a.png", "expression": "e"}, "no box"),
    ("grounding", {"image": "a.png", "expression": "e", "box": [0, 0, 1]}, "box is not four numbers"),
    ("grounding", {"image": "a.png", "expression": "e", "box": [0, 0, "nan", 1]}, "box is not four numbers"),
    ("grounding", {"image": "a.png", "expression": "e", "box": 5}, "box is not four numbers"),
    ("grounding", {"image": "a.png", "expression": "e", "box": [2, 0, 2, 1]}, "box without area"),
    ("grounding", {"image": "a.png", "expression": "e", "box": [0, 0, 5.5, 3]}, "box outside the image .* is 4 x 3"),
    ("grounding", {"image": "a.png", "expression": "e", "box": [4, 0, 4.5, 3]}, "box outside the image"),
    ("grounding", {"image": "a.png", "box": [0, 0, 1, 1]}, "no expression"),
]


@pytest.mark.parametrize(("task", "record", "reason"), BAD_OF_TASK, ids=[reason for *_, reason in BAD_OF_TASK])
def test_bad_row_of_each_task_is_named(folder, task, record, reason):
    good = {"captions": CAPTIONS, "nlvr2": STATEMENTS, "grounding": EXPRESSIONS}[task]
    file = write(folder / "train.jsonl", [*good, record])
    with pytest.raises(ValueError, match=f"1 of the 3 rows .*\n.*row 3: {reason}"):
        load_task_dataset(task, train_file=file)
    assert len(load_task_dataset(task, train_file=file, skip_bad_rows=True)["train"]) == (
        3 if task == "captions" else 2
    )


def encoded(path):
    return {"bytes": path.read_bytes(), "path": path.name}


@pytest.mark.parametrize("as_image", [False, True], ids=["struct", "Image"])
def test_parquet_with_encoded_images(folder, as_image):
    a, b = encoded(folder / "a.png"), encoded(folder / "b.png")
    file = folder / "train.parquet"
    table = datasets.Dataset.from_dict(
        {"image": [a, b], "captions": [["one", "two"], ["three"]], "caption": [None, None]}
    )
    table = table.cast_column("image", datasets.Image()) if as_image else table
    table.to_parquet(file)
    rows = load_task_dataset("captions", train_file=file, cache_dir=str(folder / "cache"))["train"]
    assert rows.features == TASKS["captions"].features
    assert rows["caption"][:] == ["one", "two", "three"]
    assert rows["image_id"][:] == ["train.parquet 1", "train.parquet 1", "train.parquet 2"]
    assert rows["source"][:] == [f"train.parquet row {number}" for number in (1, 1, 2)]
    assert [(image.size, image.mode) for image in rows["image"]] == [((4, 3), "RGB")] * 2 + [((32, 32), "RGB")]
    assert rows[2]["image"].tobytes() == PIL.Image.open(folder / "b.png").tobytes()


@pytest.mark.parametrize("columns", ["images", "pair"])
def test_parquet_with_encoded_pairs(folder, columns):
    a, b = encoded(folder / "a.png"), encoded(folder / "b.png")
    images = {"images": [[a, b], [b, a]]} if columns == "images" else {"left_image": [a, b], "right_image": [b, a]}
    file = folder / "train.parquet"
    datasets.Dataset.from_dict({**images, "statement": ["s", "t"], "label": [0, 1]}).to_parquet(file)
    rows = load_task_dataset("nlvr2", train_file=file, cache_dir=str(folder / "cache"))["train"]
    assert rows.features == TASKS["nlvr2"].features
    assert rows["image_ids"][:] == [[f"train.parquet {row} {side}" for side in ("left", "right")] for row in (1, 2)]
    assert [[image.size for image in pair] for pair in rows["images"]] == [[(4, 3), (32, 32)], [(32, 32), (4, 3)]]


def test_parquet_with_bad_encoded_images(folder):
    a, text = encoded(folder / "a.png"), encoded(folder / "text.png")
    table = {"image": [a, text, None, a], "expression": ["e"] * 4, "box": [[0, 0, 4, 3]] * 3 + [[0, 0, 9, 9]]}
    file = folder / "train.parquet"
    datasets.Dataset.from_dict(table).to_parquet(file)
    with pytest.raises(ValueError) as raised:
        load_task_dataset("grounding", train_file=file, cache_dir=str(folder / "cache"))
    reasons = re.findall(r"row \d: [a-z ]+", str(raised.value))
    assert reasons == ["row 2: unreadable image ", "row 3: no image", "row 4: box outside the image "]


def test_unknown_task():
    with pytest.raises(ValueError, match="task is 'ocr': choose one of vqa, captions, nlvr2, grounding"):
        load_task_dataset("ocr")


def test_contradicting_arguments(folder):
    with pytest.raises(ValueError, match="'easy_vqa'.*one or the other"):
        load_task_dataset("vqa", "easy_vqa", train_file=folder / "a.json")
    with pytest.raises(ValueError, match="image_root.*goes with train_file"):
        load_task_dataset("vqa", image_root=folder)
    with pytest.raises(ValueError, match="easy_vqa has questions only: for captions take easy_vqa_scenes"):
        load_task_dataset("captions", "easy_vqa")
    with pytest.raises(ValueError, match="validation_split: easy_vqa has its own splits"):
        load_task_dataset("vqa", validation_split="test")


# The Hub: a local folder stands in for a repository


@pytest.fixture
def repository(folder):
    records = [
        {"question_id": 5, "question": "what?", "answers": [{"answer": "red", "answer_id": i} for i in range(10)]},
        {"question_id": 6, "question": "", "answers": [{"answer": "blue", "answer_id": 0}]},
        {"question_id": 7, "question": "where?", "answers": [{"answer": "here", "answer_id": 0}]},
    ]
    images = [str(folder / "a.png"), str(folder / "a.png"), str(folder / "b.png")]
    rows = datasets.Dataset.from_list([{"image": i, **r} for i, r in zip(images, records, strict=True)])
    rows = rows.cast_column("image", datasets.Image())
    (folder / "repository").mkdir()
    rows.select([0, 2]).to_parquet(folder / "repository" / "train-0.parquet")
    rows.to_parquet(folder / "repository" / "validation-0.parquet")
    return folder


def test_hub(repository):
    name, cache_dir = str(repository / "repository"), str(repository / "cache")
    with pytest.raises(ValueError, match="repository validation row 2: no question"):
        load_task_dataset("vqa", name, cache_dir=cache_dir)
    loaded = load_task_dataset("vqa", name, cache_dir=cache_dir, skip_bad_rows=True)
    for split, numbers in {"train": [1, 2], "validation": [1, 3]}.items():
        rows = loaded[split]
        assert rows.features == VQA_FEATURES
        assert rows["source"][:] == [f"{name} {split} row {number}" for number in numbers]
        assert rows["question_id"][:] == ["5", "7"]
        assert rows["answers"][:] == [["red"] * 10, ["here"]]
        assert [image.size for image in rows["image"]] == [(4, 3), (32, 32)]
        assert rows[0]["image"].mode == "RGB"


def test_hub_splits_by_name(repository):
    name, given = str(repository / "repository"), {"cache_dir": str(repository / "cache"), "skip_bad_rows": True}
    swapped = load_task_dataset("vqa", name, train_split="validation", validation_split="train", **given)
    assert swapped["train"]["source"][0] == f"{name} validation row 1"
    assert swapped["validation"]["source"][0] == f"{name} train row 1"
    with pytest.raises(ValueError, match="no split .'testA'., only .'train', 'validation'.: .*validation_split"):
        load_task_dataset("vqa", name, validation_split="testA", **given)


def test_hub_without_validation(repository):
    (repository / "repository" / "validation-0.parquet").unlink()
    with pytest.raises(ValueError, match="no split .'validation'., only .'train'."):
        load_task_dataset("vqa", str(repository / "repository"), cache_dir=str(repository / "cache"))


def test_hub_for_evaluation_only(repository):
    (repository / "repository" / "train-0.parquet").unlink()
    given = {"cache_dir": str(repository / "cache"), "skip_bad_rows": True}
    assert list(load_task_dataset("vqa", str(repository / "repository"), **given)) == ["validation"]
    with pytest.raises(ValueError, match="no split .'train'."):
        load_task_dataset("vqa", str(repository / "repository"), train_split="train", **given)


def test_hub_without_the_columns_of_the_task(repository):
    with pytest.raises(ValueError, match="has no columns .'caption'., only .*'question'.*: rename them"):
        load_task_dataset("captions", str(repository / "repository"), cache_dir=str(repository / "cache"))


def test_hub_checks_boxes_against_images(folder):
    (folder / "repository").mkdir()
    images = [encoded(folder / "a.png"), encoded(folder / "b.png")]
    table = datasets.Dataset.from_dict(
        {"image": images, "expression": ["e", "f"], "box": [[0, 0, 4, 3], [0, 0, 40, 9]]}
    )
    for split in ("train", "validation"):
        table.cast_column("image", datasets.Image()).to_parquet(folder / "repository" / f"{split}-0.parquet")
    with pytest.raises(ValueError, match="1 of the 2 rows .*\n.*row 2: box outside the image .* is 32 x 32"):
        load_task_dataset("grounding", str(folder / "repository"), cache_dir=str(folder / "cache"))
