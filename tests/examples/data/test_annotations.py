"""Annotation files of public data sets: small files of the same form."""

import contextlib
import json
import pickle
import re
from resource import RUSAGE_SELF, getrusage

import numpy as np
import PIL.Image
import pytest
from loading import load

from trips_examples.data.annotations import AnnotationFile, read_annotations, read_plain_pickle


@pytest.fixture
def coco(tmp_path):
    """Write images of 40 x 30 pixels with COCO's names and folders."""
    names = {
        "train2014": ["COCO_train2014_000000000009.jpg", "COCO_train2014_000000581857.jpg"],
        "val2014": ["COCO_val2014_000000391895.jpg", "COCO_val2014_000000060623.jpg"],
        "train2017": ["000000000139.jpg"],
    }
    for folder, files in names.items():
        (tmp_path / "images" / folder).mkdir(parents=True)
        for number, file in enumerate(files):
            PIL.Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(tmp_path / "images" / folder / file)
    return tmp_path


def write(file, content):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def names_of(rows):
    """Return the image files with their folders."""
    return [
        re.sub(r".*/(.*/)", r"\1", path)
        for path in rows.data.column("image").combine_chunks().field("path").to_pylist()
    ]


# VQAv2


def vqa(folder, subtype="train2014", questions=None):
    questions = questions or [
        {"image_id": 9, "question": "What is it?", "question_id": 9000},
        {"image_id": 9, "question": "How many?", "question_id": 9001},
        {"image_id": 581857, "question": "Is it red?", "question_id": 581857002},
    ]
    file = write(
        folder / f"v2_OpenEnded_mscoco_{subtype}_questions.json",
        {
            "info": {},
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "data_subtype": subtype,
            "questions": questions,
        },
    )
    answers = {9000: ["broccoli", "broccoli", "food"], 581857002: ["yes"], 9001: ["2", "two", "2"]}
    annotations = [
        {
            "question_type": "what",
            "multiple_choice_answer": given[0],
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(given, 1)],
            "image_id": 9 if question_id < 10000 else 581857,
            "answer_type": "other",
            "question_id": question_id,
        }
        for question_id, given in answers.items()
    ]
    name = file.name.replace("OpenEnded_", "").replace("questions", "annotations")
    return file, write(folder / name, {"info": {}, "data_subtype": subtype, "annotations": annotations})


def test_vqa_finds_its_annotations(coco):
    file, _ = vqa(coco / "vqa")
    rows = load("vqa", train_file=file, image_root=coco / "images")["train"]
    assert names_of(rows) == [
        f"train2014/COCO_train2014_{number}.jpg" for number in ("000000000009",) * 2 + ("000000581857",)
    ]
    assert rows["image_id"][:] == ["9", "9", "581857"]
    assert rows["question_id"][:] == ["9000", "9001", "581857002"]
    assert rows["question"][:] == ["What is it?", "How many?", "Is it red?"]
    assert rows["answers"][:] == [["broccoli", "broccoli", "food"], ["2", "two", "2"], ["yes"]]
    assert rows["kind"][:] == ["what"] * 3 and rows["answer_type"][:] == ["other"] * 3
    assert rows["source"][2] == "v2_OpenEnded_mscoco_train2014_questions.json row 3"


def test_vqa_needs_its_annotations_and_finds_images_in_one_folder(coco):
    file, annotations = vqa(coco / "vqa")
    folder = coco / "images" / "train2014"
    rows = load("vqa", train_file=file, image_root=folder)["train"]
    assert names_of(rows)[2] == "train2014/COCO_train2014_000000581857.jpg"
    annotations.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=annotations.name):
        load("vqa", train_file=file, image_root=folder)
    annotations.unlink()
    with pytest.raises(FileNotFoundError, match=annotations.name):
        load("vqa", train_file=file, image_root=folder)


def test_vqa_question_without_answers_is_named(coco):
    questions = [{"image_id": 9, "question": "Why?", "question_id": 1}, {"image_id": 9}]
    file, _ = vqa(coco / "vqa", questions=questions[:1])
    with pytest.raises(ValueError, match="row 1: no answer"):
        load("vqa", train_file=file, image_root=coco / "images")
    file, _ = vqa(coco / "vqa", questions=questions)
    with pytest.raises(ValueError, match="row 1.*'question_id'"):
        load("vqa", train_file=file, image_root=coco / "images")


def test_vqa_test_dev_has_the_images_of_test(coco):
    """The questions have no answers; only the names of the images are checked."""
    file, _ = vqa(coco / "vqa", "test-dev2015")
    _, record = next(iter(read_annotations(AnnotationFile(file, "val"), "vqa")))
    assert record["image"] == "test2015/COCO_test2015_000000000009.jpg"


# Captions


def test_coco_captions(coco):
    images = [
        {"id": 581857, "file_name": "COCO_train2014_000000581857.jpg"},
        {"id": 9, "file_name": "COCO_train2014_000000000009.jpg"},
    ]
    annotations = [
        {"image_id": 9, "id": 1, "caption": "A plate."},
        {"image_id": 581857, "id": 2, "caption": "A bear. "},
        {"image_id": 9, "id": 3, "caption": "Some food."},
    ]
    file = write(coco / "captions_train2014.json", {"info": {}, "images": images, "annotations": annotations})
    rows = load("captions", train_file=file, image_root=coco / "images")["train"]
    assert rows["caption"][:] == ["A plate.", "A bear.", "Some food."]
    assert rows["image_id"][:] == ["9", "581857", "9"]
    assert names_of(rows)[1] == "train2014/COCO_train2014_000000581857.jpg"
    write(file, {"images": images[:1], "annotations": annotations})
    with pytest.raises(ValueError, match="COCO.* 9"):
        load("captions", train_file=file, image_root=coco / "images")


def test_coco_2017_names_its_folder_in_the_address(coco):
    url = "http://images.cocodataset.org/train2017/000000000139.jpg"
    images = [{"id": 139, "file_name": "000000000139.jpg", "coco_url": url}]
    content = {"images": images, "annotations": [{"image_id": 139, "caption": "A room."}]}
    file = write(coco / "captions.json", content)
    rows = load("captions", validation_file=file, image_root=coco / "images")["validation"]
    assert names_of(rows) == ["train2017/000000000139.jpg"]


def karpathy(file, splits, **more):
    names = ["COCO_val2014_000000391895.jpg", "COCO_val2014_000000060623.jpg"]
    images = [
        {
            "filename": names[i % 2],
            "imgid": i,
            "split": split,
            "sentids": [2 * i, 2 * i + 1],
            "sentences": [{"raw": f"Caption {2 * i + j}.", "tokens": ["caption"], "imgid": i} for j in (0, 1)],
            **{key: value(i) for key, value in more.items()},
        }
        for i, split in enumerate(splits)
    ]
    return write(file, {"images": images, "dataset": "coco"})


def test_karpathy_splits(coco):
    more = {"filepath": lambda i: "val2014", "cocoid": lambda i: [391895, 60623][i % 2]}
    file = karpathy(coco / "dataset_coco.json", ["test", "restval", "val", "train"], **more)
    loaded = load("captions", train_file=file, validation_file=file, image_root=coco / "images")
    train, validation = loaded["train"], loaded["validation"]
    assert train["caption"][:] == ["Caption 2.", "Caption 3.", "Caption 6.", "Caption 7."]
    assert train["image_id"][:] == ["60623"] * 4
    assert train["source"][:] == ["dataset_coco.json row 2"] * 2 + ["dataset_coco.json row 4"] * 2
    assert validation["caption"][:] == ["Caption 4.", "Caption 5."]
    assert names_of(validation) == ["val2014/COCO_val2014_000000391895.jpg"] * 2
    test = load("captions", validation_file=file, validation_split="test", image_root=coco / "images")
    assert test["validation"]["caption"][:] == ["Caption 0.", "Caption 1."]
    with pytest.raises(ValueError, match="'dev'.*--validation_split"):
        load("captions", validation_file=file, validation_split="dev", image_root=coco / "images")


def test_karpathy_of_flickr30k(coco):
    """Flickr30k has neither COCO's folders nor its numbers."""
    file = karpathy(coco / "dataset_flickr30k.json", ["train"])
    rows = load("captions", train_file=file, image_root=coco / "images" / "val2014")["train"]
    assert rows["image_id"][:] == ["0", "0"]
    assert names_of(rows)[0] == "val2014/COCO_val2014_000000391895.jpg"


# NLVR2


def nlvr2(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def nlvr2_line(identifier, label, **more):
    urls = {"left_url": "http://a", "right_url": "http://b", "writer": 1, "synset": "dog", "query": "dogs1"}
    return {
        "validation": {"1": label},
        "sentence": f"About {identifier}.",
        "label": label,
        "identifier": identifier,
        **urls,
        **more,
    }


@pytest.mark.parametrize(
    "folders", [{"train": "train/55", "dev": "dev"}, {"train": "55", "dev": ""}, {"train": "", "dev": ""}]
)
def test_nlvr2(tmp_path, folders):
    for split, stem in (("train", "train-10171-0"), ("dev", "dev-850-0")):
        (tmp_path / folders[split]).mkdir(parents=True, exist_ok=True)
        for side, width in ((0, 6), (1, 9)):
            PIL.Image.new("RGBA", (width, 5)).save(tmp_path / folders[split] / f"{stem}-img{side}.png")
    # The official files end with .json, and hold an object per line.
    train = nlvr2(tmp_path / "train.json", [nlvr2_line("train-10171-0-1", "False", directory=55)])
    dev = nlvr2(
        tmp_path / "dev.json", [nlvr2_line(f"dev-850-0-{i}", label) for i, label in ((0, "True"), (1, "False"))]
    )
    loaded = load("nlvr2", train_file=train, validation_file=dev, image_root=tmp_path)
    assert loaded["validation"]["label"][:] == [1, 0]
    assert loaded["validation"]["question_id"][:] == ["dev-850-0-0", "dev-850-0-1"]
    (row,) = loaded["train"]
    assert (row["statement"], row["label"], row["source"]) == ("About train-10171-0-1.", 0, "train.json row 1")
    assert [image.size for image in row["images"]] == [(6, 5), (9, 5)]
    assert all(image_id.endswith(f"train-10171-0-img{side}.png") for side, image_id in enumerate(row["image_ids"]))


# RefCOCO


def refcoco(folder, protocol=0):
    """Write files with the old pickle protocol of the official ones."""
    boxes = {1: [1.5, 2.0, 10.0, 20.5], 2: [0.0, 0.0, 40.0, 30.0]}
    images = [{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 40, "height": 30}]
    annotations = [{"id": i, "image_id": 581857, "category_id": 1, "bbox": box} for i, box in boxes.items()]
    write(folder / "instances.json", {"images": images, "annotations": annotations, "categories": []})
    sentences = {11: ["the left one", "LEFT"], 12: ["the whole"], 13: ["it"]}
    refs = [
        {
            "ref_id": ref_id,
            "ann_id": ann_id,
            "image_id": 581857,
            "split": split,
            "category_id": 1,
            "file_name": f"COCO_train2014_000000581857_{ann_id}.jpg",
            "sent_ids": [10 * ref_id + i for i in range(len(sentences[ref_id]))],
            "sentences": [
                {"raw": text.upper(), "sent": text.lower(), "tokens": text.split(), "sent_id": 10 * ref_id + i}
                for i, text in enumerate(sentences[ref_id])
            ],
        }
        for ref_id, ann_id, split in ((12, 2, "testA"), (11, 1, "train"), (13, 1, "val"))
    ]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol))
    return folder / "refs(unc).p"


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_refcoco(coco, protocol):
    (coco / "refcoco").mkdir()
    file = refcoco(coco / "refcoco", protocol)
    loaded = load(
        "grounding", train_file=file, validation_file=file, validation_split="testA", image_root=coco / "images"
    )
    train, (test,) = loaded["train"], loaded["validation"]
    assert train["expression"][:] == ["the left one", "left"]
    assert train["box"][:] == [[1.5, 2.0, 11.5, 22.5]] * 2  # x, y, width, height -> corners
    assert train["question_id"][:] == ["110", "111"]
    assert train["source"][:] == ["refs(unc).p row 2"] * 2
    assert (test["expression"], test["box"], test["image_id"]) == ("the whole", [0, 0, 40, 30], "581857")
    assert test["image"].size == (40, 30)
    validation = load("grounding", validation_file=file, image_root=coco / "images")["validation"]
    assert validation["expression"][:] == ["it"]


def test_refcoco_needs_its_boxes(coco):
    (coco / "refcoco").mkdir()
    given = {"train_file": refcoco(coco / "refcoco"), "image_root": coco / "images"}
    boxes = {"images": [], "annotations": [{"id": 1, "bbox": [0, 0, 1, 1]}]}
    instances = write(coco / "refcoco" / "instances.json", boxes)
    with pytest.raises(ValueError, match="RefCOCO.*581857"):
        load("grounding", **given)
    instances.unlink()
    with pytest.raises(FileNotFoundError, match="instances.json"):
        load("grounding", **given)


# ALBEF's lists


@pytest.mark.parametrize(
    ("task", "record", "expected"),
    [
        ("captions", {"caption": "One.", "image_id": "coco_9"}, {"caption": ["One."], "image_id": ["coco_9"]}),
        ("captions", {"caption": ["One.", "Two."]}, {"caption": ["One.", "Two."]}),
        (
            "vqa",
            {"question": "What?", "question_id": 5, "answer": ["red", "red", "blue"], "dataset": "vqa"},
            {"question_id": ["5"], "answers": [["red", "red", "blue"]]},
        ),
        ("vqa", {"question": "What?", "answer": "green", "dataset": "vg"}, {"answers": [["green"]]}),
        ("nlvr2", {"sentence": "Both.", "label": "True"}, {"statement": ["Both."], "label": [1]}),
    ],
    ids=["captions", "several captions", "questions", "questions of Visual Genome", "NLVR2"],
)
def test_albef_lists(coco, task, record, expected):
    images = [f"train2014/COCO_train2014_{number}.jpg" for number in ("000000000009", "000000581857")]
    record = {"images": images, **record} if task == "nlvr2" else {"image": images[1], **record}
    file = write(coco / "albef.json", [record])
    rows = load(task, train_file=file, image_root=coco / "images")["train"]
    assert {name: rows[name][:] for name in expected} == expected
    found = rows[0]["images"] if task == "nlvr2" else [rows[0]["image"]]
    assert [np.asarray(image)[0, 0, 0] // 10 for image in found] == [0, 5][-len(found) :]


# What does not fit


def test_files_for_another_task_are_named(coco):
    file, _ = vqa(coco / "vqa")
    with pytest.raises(ValueError, match="'vqa'.*'captions'"):
        load("captions", train_file=file)
    with pytest.raises(ValueError, match="'captions'.*'nlvr2'"):
        load("nlvr2", train_file=karpathy(coco / "dataset_coco.json", ["train"]))


def test_split_of_a_file_without_splits_is_refused(coco):
    file, _ = vqa(coco / "vqa")
    with pytest.raises(ValueError, match="--validation_split"):
        load("vqa", validation_file=file, validation_split="val")


def test_public_file_that_is_not_whole_is_named(coco):
    file, _ = vqa(coco / "vqa")
    content = json.loads(file.read_text())
    del content["data_subtype"]
    with pytest.raises(ValueError, match="questions.json.*data_subtype"):
        load("vqa", train_file=write(file, content))


# Pickles


class Hostile:
    """Object that makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_pickle_runs_nothing(tmp_path, protocol):
    file = tmp_path / "refs(unc).p"
    content = pickle.dumps([{"ref_id": 1, "sentences": Hostile(tmp_path / "made")}], protocol)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"refs.unc..p.*\w+.mkdir"):
        load("grounding", train_file=file)
    assert not (tmp_path / "made").exists()
    pickle.loads(content)  # the same file, read as anyone would
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "value",
    [np.float64(1.5), np.zeros(2), {1, Ellipsis}, complex(1, 2), Hostile, len, AnnotationFile, range(3)],
    ids=repr,
)
def test_no_class_or_function_is_unpickled(tmp_path, value):
    (tmp_path / "file.p").write_bytes(pickle.dumps([value], 2))
    with pytest.raises(ValueError, match="it refers to"):
        read_plain_pickle(tmp_path / "file.p")


def test_pickle_of_plain_data_is_read(tmp_path):
    value = [{"a": [1, 2.5, "é", None, True]}, ("b",), 2**70, b"c"]
    for protocol in (3, 4, 5):
        (tmp_path / "file.p").write_bytes(pickle.dumps(value, protocol))
        assert read_plain_pickle(tmp_path / "file.p") == value
    (tmp_path / "file.p").write_bytes(b"(lp0\nS'caf\\xc3\\xa9'\np1\na.")  # as written by Python 2
    assert read_plain_pickle(tmp_path / "file.p") == ["café"]


@pytest.mark.parametrize(
    "content",
    [
        b"]r\xff\xff\xff\x0f.",
        b"]p4000000000\n.",
        b"\x80\x05B\xff\xff\xff\x0fabc.",
        b"\x80\x05\x95" + b"\xff" * 7 + b"\x0f].",
    ],
    ids=["LONG_BINPUT", "PUT", "BINBYTES", "FRAME"],
)
def test_a_small_pickle_takes_little_memory(tmp_path, content):
    """The pickles claim a large memo index or length."""
    file = tmp_path / "file.p"
    file.write_bytes(content)
    peak = getrusage(RUSAGE_SELF).ru_maxrss  # KiB
    with contextlib.suppress(ValueError):
        read_plain_pickle(file)
    assert getrusage(RUSAGE_SELF).ru_maxrss - peak < 2**16


def test_broken_and_other_pickles_are_named(tmp_path):
    file = tmp_path / "refs.p"
    for content, message in (
        (b"no pickle", "refs.p"),
        (pickle.dumps([1]), "refs.p is a pickle, and not of"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load("grounding", train_file=file)
