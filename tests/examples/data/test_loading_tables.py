"""Tables with images: Parquet, and data sets on the Hub, replaced by a local folder."""

import re

import datasets
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
from loading import encoded, load, write

from modeling_trips import convert_to_rgb
from trips_examples.data.tasks import TASKS, VQA_FEATURES


@pytest.mark.parametrize("as_image", [False, True], ids=["struct", "Image"])
def test_parquet_with_encoded_images(folder, as_image):
    a, b = encoded(folder / "a.png"), encoded(folder / "b.png")
    file = folder / "train.parquet"
    table = datasets.Dataset.from_dict(
        {"image": [a, b], "captions": [["one", "two"], ["three"]], "caption": [None, None]}
    )
    table = table.cast_column("image", datasets.Image()) if as_image else table
    table.to_parquet(file)
    rows = load("captions", train_file=file, cache_dir=str(folder / "cache"))["train"]
    assert rows.features == TASKS["captions"].features
    assert rows["caption"][:] == ["one", "two", "three"]
    assert rows["image_id"][:] == ["train.parquet 1", "train.parquet 1", "train.parquet 2"]
    assert rows["source"][:] == [f"train.parquet row {number}" for number in (1, 1, 2)]
    assert [(image.size, image.mode) for image in rows["image"]] == [((4, 3), "L")] * 2 + [((32, 32), "RGB")]
    assert rows[2]["image"].tobytes() == PIL.Image.open(folder / "b.png").tobytes()


@pytest.mark.parametrize("columns", ["images", "pair"])
def test_parquet_with_encoded_pairs(folder, columns):
    a, b = encoded(folder / "a.png"), encoded(folder / "b.png")
    images = {"images": [[a, b], [b, a]]} if columns == "images" else {"left_image": [a, b], "right_image": [b, a]}
    file = folder / "train.parquet"
    datasets.Dataset.from_dict({**images, "statement": ["s", "t"], "label": [0, 1]}).to_parquet(file)
    rows = load("nlvr2", train_file=file, cache_dir=str(folder / "cache"))["train"]
    assert rows.features == TASKS["nlvr2"].features
    assert rows["image_ids"][:] == [[f"train.parquet {row} {side}" for side in ("left", "right")] for row in (1, 2)]
    assert [[image.size for image in pair] for pair in rows["images"]] == [[(4, 3), (32, 32)], [(32, 32), (4, 3)]]


@pytest.mark.parametrize("type", [pyarrow.binary(), pyarrow.large_binary()], ids=str)
def test_parquet_with_plain_bytes(folder, type):
    """Pandas, Spark and img2dataset write such files."""
    a, b = ((folder / name).read_bytes() for name in ("a.png", "b.png"))
    given = {"train_file": folder / "train.parquet", "cache_dir": str(folder / "cache")}
    table = {"image": pyarrow.array([a, b, None], type), "caption": ["one", "two", "three"]}
    pyarrow.parquet.write_table(pyarrow.table(table), given["train_file"])
    with pytest.raises(ValueError, match="row 3: no image"):
        load("captions", **given)
    rows = load("captions", **given, skip_bad_rows=True)["train"]
    assert rows["caption"][:] == ["one", "two"]
    assert rows[1]["image"].tobytes() == PIL.Image.open(folder / "b.png").tobytes()
    pairs = pyarrow.array([[a, b], [b, a]], pyarrow.list_(type))
    pyarrow.parquet.write_table(
        pyarrow.table({"images": pairs, "statement": ["s", "t"], "label": [0, 1]}), given["train_file"]
    )
    rows = load("nlvr2", **given)["train"]
    assert [[image.size for image in pair] for pair in rows["images"]] == [[(4, 3), (32, 32)], [(32, 32), (4, 3)]]


def test_images_of_a_row_are_those_that_the_models_see(folder):
    """A row's image gives the same `pixel_values` as in training, also with 16 bits."""
    deep, clear = np.full((8, 8), 82 * 257, np.uint16), PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    PIL.Image.fromarray(deep).save(folder / "deep.png")
    clear.save(folder / "clear.png")
    file = write(folder / "train.jsonl", [{"image": f"{name}.png", "caption": "a"} for name in ("deep", "clear")])
    rows = load("captions", train_file=file)["train"]
    assert [convert_to_rgb(row["image"]).getpixel((0, 0)) for row in rows] == [(82, 82, 82), (255, 255, 255)]


def test_parquet_with_bad_encoded_images(folder):
    a, text = encoded(folder / "a.png"), encoded(folder / "text.png")
    table = {"image": [a, text, None, a], "expression": ["e"] * 4, "box": [[0, 0, 4, 3]] * 3 + [[0, 0, 9, 9]]}
    file = folder / "train.parquet"
    datasets.Dataset.from_dict(table).to_parquet(file)
    with pytest.raises(ValueError) as raised:
        load("grounding", train_file=file, cache_dir=str(folder / "cache"))
    reasons = re.findall(r"row \d: [a-z ]+", str(raised.value))
    assert reasons == ["row 2: unreadable image ", "row 3: no image ", "row 4: box outside the image "]


# The Hub, replaced by a local folder


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
        load("vqa", name, cache_dir=cache_dir)
    loaded = load("vqa", name, cache_dir=cache_dir, skip_bad_rows=True)
    for split, numbers in {"train": [1, 2], "validation": [1, 3]}.items():
        rows = loaded[split]
        assert rows.features == VQA_FEATURES
        assert rows["source"][:] == [f"{name} {split} row {number}" for number in numbers]
        assert rows["question_id"][:] == ["5", "7"]
        assert rows["answers"][:] == [["red"] * 10, ["here"]]
        assert [image.size for image in rows["image"]] == [(4, 3), (32, 32)]
        assert rows[0]["image"].mode == "L"


def test_hub_splits_by_name(repository):
    name, given = str(repository / "repository"), {"cache_dir": str(repository / "cache"), "skip_bad_rows": True}
    swapped = load("vqa", name, train_split="validation", validation_split="train", **given)
    assert swapped["train"]["source"][0] == f"{name} validation row 1"
    assert swapped["validation"]["source"][0] == f"{name} train row 1"
    with pytest.raises(ValueError, match="'testA'.*validation_split"):
        load("vqa", name, validation_split="testA", **given)


def test_hub_without_validation(repository):
    (repository / "repository" / "validation-0.parquet").unlink()
    with pytest.raises(ValueError, match="no split .'validation'., only .'train'."):
        load("vqa", str(repository / "repository"), cache_dir=str(repository / "cache"))


def test_hub_for_evaluation_only(repository):
    (repository / "repository" / "train-0.parquet").unlink()
    given = {"cache_dir": str(repository / "cache"), "skip_bad_rows": True}
    assert list(load("vqa", str(repository / "repository"), **given)) == ["validation"]
    with pytest.raises(ValueError, match="no split .'train'."):
        load("vqa", str(repository / "repository"), train_split="train", **given)


def test_hub_without_the_columns_of_the_task(repository):
    with pytest.raises(ValueError, match="'caption'.*'question'"):
        load("captions", str(repository / "repository"), cache_dir=str(repository / "cache"))


def test_hub_checks_boxes_against_images(folder):
    (folder / "repository").mkdir()
    images = [encoded(folder / "a.png"), encoded(folder / "b.png")]
    table = datasets.Dataset.from_dict(
        {"image": images, "expression": ["e", "f"], "box": [[0, 0, 4, 3], [0, 0, 40, 9]]}
    )
    for split in ("train", "validation"):
        table.cast_column("image", datasets.Image()).to_parquet(folder / "repository" / f"{split}-0.parquet")
    with pytest.raises(ValueError, match="row 2: box outside the image.*32 x 32"):
        load("grounding", str(folder / "repository"), cache_dir=str(folder / "cache"))
