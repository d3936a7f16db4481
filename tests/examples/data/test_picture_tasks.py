"""Composed scenes as data of every task: disjoint splits, and images that are rendered when rows are read."""

from collections import Counter

import pytest
from named_pictures import NAMES, write_pictures

from modeling_trips import TripsConfig
from trips_examples.data.loading import load_task_dataset
from trips_examples.data.picture_scenes import SceneMaker
from trips_examples.data.picture_texts import QUESTION_KINDS
from trips_examples.data.pictures import split_of
from trips_examples.data.rows import column_of, image_sizes, images_of, without_decoding
from trips_examples.data.source import DataSource
from trips_examples.data.texts import with_fitting_texts
from trips_examples.data.vocabulary import train_wordpiece_tokenizer
from trips_examples.metrics.groups import groups_of
from trips_examples.training.models import make_processor
from trips_examples.training.options import DataArguments


TASKS = ["vqa", "captions", "nlvr2", "grounding"]
TEXTS = {"vqa": "question", "captions": "caption", "nlvr2": "statement", "grounding": "expression"}
SHARES = {"validation": 0.4, "test": 0.15}
NAMES_OF = {split: {name for name in NAMES if split_of(name, SHARES) == split} for split in ("train", *SHARES)}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> dict:
    file = str(write_pictures(tmp_path_factory.mktemp("pictures")))
    sizes = {"train_scenes": 12, "validation_scenes": 8, "test_scenes": 8, "scene_size": 64}
    sizes |= {f"{split}_names": share for split, share in SHARES.items()}
    return {"dataset_name": "picture_scenes", "pictures": [file], **sizes}


def names_in(text: str) -> set[str]:
    return {name for name in NAMES if name in text}


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_name_and_are_the_same_each_time(task, source):
    data, again = (load_task_dataset(task, DataSource(**source)) for _ in range(2))
    assert all(len(names) >= 2 for names in NAMES_OF.values()) and list(data) == list(NAMES_OF)
    for split, names in NAMES_OF.items():
        rows = list(data[split])
        assert rows == list(again[split]) and len(rows) >= 8
        said = set().union(*(names_in(row[TEXTS[task]]) for row in rows))
        assert said and said <= names
    other = load_task_dataset(task, DataSource(**source), seed=1)
    assert other["train"][TEXTS[task]] != data["train"][TEXTS[task]]


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_a_scene_share_one_image_that_is_made_when_they_are_read(task, source):
    data = without_decoding(load_task_dataset(task, DataSource(**source))["train"])
    assert not {"image", "images"} & set(data.column_names)
    rows = data.__getitems__(list(range(len(data))))
    images = {}
    for row in rows:
        both = zip(row["image_ids"], row["images"]) if task == "nlvr2" else [(row["image_id"], row["image"])]
        for image_id, image in both:
            assert images.setdefault(image_id, image) is image and image.size == (64, 64) and image.mode == "RGB"
    assert data[0].get("image", data[0].get("images")) is not None
    if task != "nlvr2":
        assert image_sizes(data) == dict.fromkeys(images, (64, 64)) and len(images_of(data)[0]) == len(images)


@pytest.mark.parametrize("task", TASKS)
def test_columns_are_read_without_making_images(task, source, monkeypatch):
    """Training reads all texts and boxes before it starts, without rendering thousands of scenes."""
    data = load_task_dataset(task, DataSource(**source))

    def render(maker, recipe):
        raise AssertionError(f"made the image of {recipe}")

    monkeypatch.setattr(SceneMaker, "render", render)
    processor = make_processor(train_wordpiece_tokenizer(NAMES), TripsConfig.from_preset("tiny"))
    fitting = with_fitting_texts(data, task, processor, skip=False)["validation"]
    texts = column_of(data["validation"], TEXTS[task])
    assert column_of(fitting, TEXTS[task]) == texts and len(texts) >= 8
    if task in ("vqa", "grounding"):
        assert sum(map(len, groups_of(fitting).values())) > len(texts)  # by kind, and by size
    if task != "nlvr2":
        assert len(images_of(fitting)[0]) == 8
    with pytest.raises(AssertionError, match="made the image"):
        fitting[0]


def test_the_kinds_of_questions_are_chosen(source):
    every, some = (
        load_task_dataset("vqa", DataSource(**source, question_kinds=kinds))["train"]
        for kinds in (QUESTION_KINDS, ["count", "presence"])
    )
    assert set(every["kind"]) == set(QUESTION_KINDS) - {"color"}  # these names contain colors
    chosen = {"count", "presence"}
    assert some["question"] == [row["question"] for row in every if row["kind"] in chosen]
    assert {row["kind"] for row in some} == chosen


def test_questions_about_places_are_not_augmented(source):
    with pytest.raises(ValueError, match="--augment"):
        load_task_dataset("vqa", DataArguments(**source, augment=True))
    load_task_dataset("grounding", DataArguments(**source, augment=True))


def test_statements_are_as_often_true_as_false_and_say_nothing_alone(source):
    data = load_task_dataset("nlvr2", DataSource(**source))["train"]
    labels = Counter((row["statement"], row["label"]) for row in data)
    assert all(labels[text, 0] == labels[text, 1] for text, _ in labels)
    assert len(data) == 2 * 12 and len({id for row in data for id in row["image_ids"]}) == 4 * 12


def test_pictures_alone_have_their_names_as_captions(source):
    data = load_task_dataset("captions", DataSource(**{**source, "dataset_name": "pictures"}))
    for split, names in NAMES_OF.items():
        assert set(data[split]["caption"]) == names and len(data[split]) == len(names)
    image = data["train"][0]["image"]
    color = image.getpixel((32, 32))
    assert image.size == (64, 64) and image.getpixel((0, 0)) == (255, 255, 255) != color


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pictures": None}, "pictures .*dataset_name"),
        ({"pictures": ["nowhere"]}, "nowhere.* pictures"),
        ({"dataset_name": "pictures"}, "vqa.*picture_scenes"),
        ({"pictures_per_scene": [1, 4]}, r"pictures_per_scene .*\[1, 4\]"),
        ({"validation_names": 1.0}, "validation_names .*1.0"),
        ({"question_kinds": ["side", "shape"]}, "question_kinds .*'shape'.* name, side, place, size,"),
        ({"train_scenes": 0}, "train_scenes"),
    ],
)
def test_options_that_make_no_scenes_are_refused(options, message, source):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_task_dataset("vqa", DataSource(**{**source, **options}))
