"""Tables with images: Parquet, and data sets on the Hub, replaced by a local folder."""

import datasets
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
from loading import encoded, load

from trips_examples.data.tasks import TASKS, VQA_FEATURES


KINDS = {
    "struct": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
    "binary": pyarrow.binary(),
    "large_binary": pyarrow.large_binary(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_parquet_with_encoded_images(folder, kind):
    """Pandas, Spark and img2dataset write plain bytes."""
    a, b = ((folder / name).read_bytes() for name in ("a.png", "b.png"))
    if kind == "struct":
        a, b = ({"bytes": content, "path": None} for content in (a, b))
    given = {"train_file": folder / "train.parquet", "cache_dir": str(folder / "cache")}
    images = pyarrow.array([a, b, None], KINDS[kind])
    captions = {"captions": [["one", "two"], ["three"], ["four"]]}
    pyarrow.parquet.write_table(pyarrow.table({"image": images, **captions}), given["train_file"])
    with pytest.raises(ValueError, match="row 3: no image"):
        load("captions", **given)
    rows = load("captions", **given, skip_bad_rows=True)["train"]
    assert rows.features == TASKS["captions"].features
    assert rows["caption"][:] == ["one", "two", "three"]
    assert rows["image_id"][:] == ["train.parquet 1", "train.parquet 1", "train.parquet 2"]
    assert rows["source"][:] == [f"train.parquet row {number}" for number in (1, 1, 2)]
    assert [(image.size, image.mode) for image in rows["image"]] == [((4, 3), "L")] * 2 + [((32, 32), "RGB")]
    assert rows[2]["image"].tobytes() == PIL.Image.open(folder / "b.png").tobytes()

    left, right = (pyarrow.array(each, KINDS[kind]) for each in ([a, b], [b, a]))
    both = pyarrow.array([[a, b], [b, a]], pyarrow.list_(KINDS[kind]))
    for columns in ({"images": both}, {"left_image": left, "right_image": right}):
        table = pyarrow.table({**columns, "statement": ["s", "t"], "label": [0, 1]})
        pyarrow.parquet.write_table(table, given["train_file"])
        rows = load("nlvr2", **given)["train"]
        assert rows.features == TASKS["nlvr2"].features
        assert rows["image_ids"][:] == [
            [f"train.parquet {row} {side}" for side in ("left", "right")] for row in (1, 2)
        ]
        assert [[image.size for image in pair] for pair in rows["images"]] == [[(4, 3), (32, 32)], [(32, 32), (4, 3)]]


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
