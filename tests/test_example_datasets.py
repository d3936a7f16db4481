"""Data sets for the examples: easy-VQA and its scenes checked against pixels, bad rows in every format, tokenizer."""

import csv
import json
import logging
import re
import subprocess
import sys
from collections import Counter

import datasets
import numpy as np
import PIL.Image
import pytest
from example_datasets import (
    EASY_VQA_COLORS,
    EASY_VQA_SHAPES,
    SCENE_FEATURES,
    VQA_FEATURES,
    easy_vqa_attributes,
    easy_vqa_scenes,
    load_vqa_dataset,
    train_wordpiece_tokenizer,
)
from transformers import AutoTokenizer


RGB = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


# easy-VQA


@pytest.fixture(scope="module")
def easy_vqa_dataset():
    pytest.importorskip("easy_vqa")
    return load_vqa_dataset()


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
        load_vqa_dataset("easy_vqa")


def color_and_shape(tile):
    """What a tile shows, by its pixels alone: the colour there is most of, and the outer rows of what has it."""
    masks = {color: (tile == rgb).all(-1) for color, rgb in RGB.items()}
    color, mask = max(masks.items(), key=lambda item: item[1].sum())
    ys, xs = np.nonzero(mask)
    box = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    return color, "rectangle" if box[0].all() else "triangle" if box[-1].all() else "circle"


@pytest.mark.parametrize(("split", "resolved"), [("train", 3578), ("test", 888)])
def test_attributes_fit_the_pixels(split, resolved):
    easy_vqa = pytest.importorskip("easy_vqa")
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    attributes = easy_vqa_attributes(split)
    assert len(attributes) == resolved
    for image_id in list(attributes)[::2]:
        assert attributes[image_id] == color_and_shape(np.asarray(PIL.Image.open(paths[image_id]))), image_id


def test_contradicting_questions_name_the_image(monkeypatch):
    easy_vqa = pytest.importorskip("easy_vqa")
    questions = (["what color is the shape?", "is there a red shape?"], ["red", "no"], [7, 7])
    monkeypatch.setattr(easy_vqa, "get_test_questions", lambda: questions)
    with pytest.raises(ValueError, match="test image 7 .*'is there a red shape\\?' with the answer 'no'"):
        easy_vqa_attributes("test")


# Scenes


@pytest.fixture(scope="module", params=[("train", 2), ("test", 3)], ids=["train 2x2", "test 3x3"])
def scenes(request):
    pytest.importorskip("easy_vqa")
    split, grid = request.param
    return split, grid, easy_vqa_scenes(split, num_scenes=60, grid=grid)


def tiles_of(image, grid):
    """Pixels of the tiles by box."""
    pixels = np.asarray(image)
    assert pixels.shape == (grid * 64, grid * 64, 3)
    origins = [(x, y) for y in range(0, grid * 64, 64) for x in range(0, grid * 64, 64)]
    return {(x, y, x + 64, y + 64): pixels[y : y + 64, x : x + 64] for x, y in origins}


def expected_answer(question, shown):
    """Answer and box by the tiles' pixels; fails where the question does not name one tile."""
    words = re.findall(r"\w+", question)
    if match := re.fullmatch(r"is there a (\w+) (\w+)\?", question):
        boxes = [box for box, tile in shown.items() if tile == match.groups()]
        if not boxes:
            assert any(color == match[1] for color, _ in shown.values()), question
            return "no", None
        answer = "yes"
    else:
        asked = {"shape": 1, "color": 0}[words[1]]
        named = next(word for word in words[2:] if word in EASY_VQA_COLORS | EASY_VQA_SHAPES)
        boxes = [box for box, tile in shown.items() if named in tile]
        answer = shown[boxes[0]][asked]
    assert len(boxes) == 1, f"{question} names {len(boxes)} tiles"
    return answer, list(boxes[0])


def test_scenes_answers_and_boxes_fit_the_pixels(scenes):
    _, grid, rows = scenes
    kinds = Counter()
    for row in rows:
        shown = {box: color_and_shape(tile) for box, tile in tiles_of(row["image"], grid).items()}
        assert (*row["answers"], row["target_box"]) == expected_answer(row["question"], shown), row
        kinds[row["question"].split()[1]] += 1
    assert len(kinds) == 3, kinds


def test_scenes_ask_for_all_that_is_unique(scenes):
    _, grid, rows = scenes
    asked = {}
    for row in rows:
        asked.setdefault(row["image_id"], []).append(row["question"])
    images = dict(zip(rows["image_id"], rows["image"], strict=True))
    for image_id, questions in asked.items():
        shown = [color_and_shape(tile) for tile in tiles_of(images[image_id], grid).values()]
        unique = sum(count == 1 for names in zip(*shown, strict=True) for count in Counter(names).values())
        assert sum(question.startswith("what") for question in questions) == unique, image_id


def test_scenes_tiles_are_from_the_split(scenes):
    split, grid, rows = scenes
    easy_vqa = pytest.importorskip("easy_vqa")
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    known = {PIL.Image.open(path).convert("RGB").tobytes() for path in paths.values()}
    images = dict(zip(rows["image_id"], rows["image"], strict=True))
    assert len(images) == 60
    for image_id, image in images.items():
        pixels = {tile.tobytes() for tile in tiles_of(image, grid).values()}
        assert len(pixels) == grid**2, f"{image_id} repeats a tile"
        assert pixels <= known, f"{image_id} has a tile that is not of {split}"


def test_scenes_presence_is_balanced(scenes):
    _, _, rows = scenes
    answers = Counter(answer for answers in rows["answers"] for answer in answers)
    assert answers["yes"] == answers["no"] > 50


def test_scenes_are_determined_by_their_arguments():
    pytest.importorskip("easy_vqa")

    def drawn(split="test", num_scenes=3, **arguments):
        rows = easy_vqa_scenes(split, num_scenes, **arguments)
        return [(row["question"], row["image"].tobytes()) for row in rows]

    base = drawn()
    assert drawn() == base
    assert drawn(num_scenes=5)[: len(base)] == base
    for changed in (drawn(seed=1), drawn("train"), drawn(grid=3)):
        assert changed[0] != base[0]


def test_load_scenes():
    pytest.importorskip("easy_vqa")
    loaded = load_vqa_dataset("easy_vqa_scenes", grid=1, train_scenes=3, validation_scenes=2, seed=5)
    assert {split: len(set(rows["image_id"])) for split, rows in loaded.items()} == {"train": 3, "validation": 2}
    assert loaded["train"].features == SCENE_FEATURES
    row = loaded["validation"][1]
    assert row["source"] == "easy_vqa_scenes test row 2"
    assert row["image"].size == (64, 64)
    for split, part, number in (("train", "train", 3), ("validation", "test", 2)):
        assert loaded[split][:] == easy_vqa_scenes(part, number, grid=1, seed=5)[:]


@pytest.mark.parametrize("arguments", [{"grid": 0}, {"grid": 9}, {"num_scenes": 0}])
def test_scenes_out_of_range(arguments):
    with pytest.raises(ValueError, match="choose"):
        easy_vqa_scenes("test", **{"num_scenes": 1, **arguments})


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
    loaded = load_vqa_dataset(train_file=file, validation_file=str(file))
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
        load_vqa_dataset(train_file=file)
    assert "1 of the 4 rows" in str(raised.value)
    assert "--skip_bad_rows" in str(raised.value)


def test_bad_rows_are_skipped_and_counted(folder, suffix, caplog):
    bad = list(BAD.values())
    file = write(folder / f"train.{suffix}", [bad[0], GOOD[0], *bad, GOOD[2], bad[-1]])
    with caplog.at_level(logging.WARNING):
        rows = load_vqa_dataset(train_file=file, skip_bad_rows=True)["train"]
    # Row 8 is the first with image_id 8, so row 9, which has it for another image, is the bad one.
    assert rows["source"][:] == [f"train.{suffix} row {number}" for number in (2, 8, 10)]
    assert f"Skipped 7 of the 10 rows of train.{suffix} (missing image: 2; " in caplog.text.replace(", ", "; ")
    for reason in list(BAD)[1:]:
        assert f"{reason}: 1" in caplog.text


def test_many_bad_rows_are_counted(folder):
    file = write(folder / "train.jsonl", [BAD["missing image"]] * 7 + GOOD)
    with pytest.raises(ValueError, match="7 of the 10 rows") as raised:
        load_vqa_dataset(train_file=file)
    named = [int(number) for number in re.findall(r"row (\d+):", str(raised.value))]
    assert named == [1, 2, 3, 4, 5]
    assert "and 2 more" in str(raised.value)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_broken_line_is_named(folder, suffix, caplog):
    lines = [json.dumps(GOOD[0]), "", '{"image": "a.png", "question', "3", "\ufffd", json.dumps(GOOD[1])]
    file = folder / f"train.{suffix}"
    file.write_bytes("\n".join(lines).encode().replace("\ufffd".encode(), b'"\xff"'))
    with pytest.raises(ValueError, match="3 of the 5 rows") as raised:
        load_vqa_dataset(train_file=file)
    for fault in ("row 3: broken JSON", "row 4: not a JSON object", "row 5: not UTF-8"):
        assert f"train.{suffix} {fault}" in str(raised.value)
    rows = load_vqa_dataset(train_file=file, skip_bad_rows=True)["train"]
    assert rows["source"][:] == [f"train.{suffix} row 1", f"train.{suffix} row 6"]
    assert "Skipped 3 of the 5 rows" in caplog.text


def test_unquoted_comma_in_csv_is_named(folder):
    file = folder / "train.csv"
    file.write_text(",image,question,answer\n0,a.png,what?,red\n1,a.png,what, then?,red\n")
    with pytest.raises(ValueError, match="1 of the 2 rows of train.csv.*\n.*row 2: more cells than the header"):
        load_vqa_dataset(train_file=file)


def test_answers_in_csv(folder):
    file = folder / "train.csv"
    file.write_text('image,question,answers\na.png,what?,"[""red|blue"", ""gray""]"\na.png,what?,red | blue|\n')
    assert load_vqa_dataset(train_file=file)["train"]["answers"][:] == [["red|blue", "gray"], ["red", "blue"]]
    file.write_text('image,question,answers\na.png,what?,"[red"\n')
    with pytest.raises(ValueError, match="row 1: answers is not a JSON list .*'\\[red'"):
        load_vqa_dataset(train_file=file)


def test_answers_that_are_not_text(folder):
    file = write(folder / "train.jsonl", [{**GOOD[0], "answer": True}, {**GOOD[0], "answers": 5}])
    with pytest.raises(ValueError, match="row 1: an answer is not text .True.*\n.*row 2: answers is not a list .5"):
        load_vqa_dataset(train_file=file)


def test_truncated_image_is_found_where_rows_are_skipped(folder, caplog):
    image = folder / "b.jpg"
    PIL.Image.open(folder / "b.png").save(image)
    image.write_bytes(image.read_bytes()[:-200])
    file = write(folder / "train.jsonl", [GOOD[0], {**GOOD[0], "image": "b.jpg"}])
    assert len(load_vqa_dataset(train_file=file, skip_bad_rows=True)["train"]) == 1
    assert "unreadable image: 1" in caplog.text


def test_damaged_image_is_found_without_decoding_it(folder):
    content = bytearray((folder / "b.png").read_bytes())
    content[-40] ^= 1
    (folder / "b.png").write_bytes(content)
    with pytest.raises(ValueError, match="row 3: unreadable image .*b.png"):
        load_vqa_dataset(train_file=write(folder / "train.jsonl", GOOD))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_byte_order_mark(folder, suffix):
    file = write(folder / f"train.{suffix}", GOOD)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_vqa_dataset(train_file=file)["train"]["question"][0] == "what?"


def test_each_image_is_opened_once(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(PIL.Image, "open", lambda path, _open=PIL.Image.open: opened.append(path.name) or _open(path))
    load_vqa_dataset(train_file=write(folder / "train.jsonl", GOOD))
    assert sorted(opened) == ["a.png", "b.png"]


def test_image_root(folder):
    annotations = folder / "annotations"
    annotations.mkdir()
    file = write(annotations / "val.json", GOOD)
    assert list(load_vqa_dataset(validation_file=file, image_root=folder)) == ["validation"]
    with pytest.raises(ValueError, match="3 of the 3 rows of val.json"):
        load_vqa_dataset(validation_file=file)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        load_vqa_dataset(validation_file=file, image_root=folder / "nowhere")


def test_files_that_cannot_be_read(folder):
    with pytest.raises(FileNotFoundError, match="no file .*none.json"):
        load_vqa_dataset(train_file=folder / "none.json")
    for name, content in {"a.txt": "", "b.json": "[{]", "c.parquet": "x", "d.csv": "image\n\xff"}.items():
        (folder / name).write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=f"{name} .*[cC]onvert"):
            load_vqa_dataset(train_file=folder / name)
    with pytest.raises(ValueError, match="empty.jsonl has no row"):
        load_vqa_dataset(train_file=write(folder / "empty.jsonl", []))


def test_contradicting_arguments(folder):
    with pytest.raises(ValueError, match="'easy_vqa'.*one or the other"):
        load_vqa_dataset("easy_vqa", train_file=folder / "a.json")
    with pytest.raises(ValueError, match="image_root.*goes with train_file"):
        load_vqa_dataset(image_root=folder)


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
        load_vqa_dataset(name, cache_dir=cache_dir)
    loaded = load_vqa_dataset(name, cache_dir=cache_dir, skip_bad_rows=True)
    for split, numbers in {"train": [1, 2], "validation": [1, 3]}.items():
        rows = loaded[split]
        assert rows.features == VQA_FEATURES
        assert rows["source"][:] == [f"{name} {split} row {number}" for number in numbers]
        assert rows["question_id"][:] == ["5", "7"]
        assert rows["answers"][:] == [["red"] * 10, ["here"]]
        assert [image.size for image in rows["image"]] == [(4, 3), (32, 32)]
        assert rows[0]["image"].mode == "RGB"


def test_hub_without_validation(repository):
    (repository / "repository" / "validation-0.parquet").unlink()
    with pytest.raises(ValueError, match="no split .'validation'., only .'train'."):
        load_vqa_dataset(str(repository / "repository"), cache_dir=str(repository / "cache"))


# Tokenizer

TEXTS = ["What shape is the red shape?", "what color is the circle?", "is there a teal triangle?", "Café"] * 2


def test_tokenizer_is_that_of_bert():
    tokenizer = train_wordpiece_tokenizer(TEXTS, vocab_size=80)
    assert len(train_wordpiece_tokenizer(TEXTS, vocab_size=60)) == 60 < len(tokenizer) <= 80
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.pad_token_id == 0
    ids = tokenizer("WHAT is the cafe?")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "what is the cafe?"
    assert tokenizer.tokenize("the") == ["the"]
    assert tokenizer.tokenize("xyz") == ["[UNK]"]
    assert set(tokenizer.all_special_tokens) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}


def test_tokenizer_saves_and_loads(tmp_path):
    tokenizer = train_wordpiece_tokenizer(TEXTS, vocab_size=80)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    pair = ("Is the circle red?", "##s [SEP] Café")
    assert loaded(*pair) == tokenizer(*pair)


def test_tokenizer_vocabulary_is_the_same_in_each_process():
    code = f"""
import sys
sys.path[:0] = {sys.path}
from example_datasets import train_wordpiece_tokenizer
print(sorted(train_wordpiece_tokenizer({TEXTS}, 80).get_vocab().items()))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == str(sorted(train_wordpiece_tokenizer(TEXTS, 80).get_vocab().items()))


def test_tokenizer_of_nothing():
    with pytest.raises(ValueError, match="2 texts without a character"):
        train_wordpiece_tokenizer(["", " "])
