"""Annotation files of public data sets: small files of the same form."""

import contextlib
import json
import os
import pickle
import re
from resource import RUSAGE_SELF, getrusage

import numpy as np
import PIL.Image
import pytest
from loading import load

from trips_examples.data.annotations import read_annotations, read_plain_pickle
from trips_examples.data.source import AnnotationFile


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
    file.write_text(json.dumps(content))
    return file


def names_of(rows):
    """Return the image files with their folders."""
    paths = rows.data.column("image").combine_chunks().field("path").to_pylist()
    return [re.sub(r".*/(.*/)", r"\1", path) for path in paths]


# VQAv2


def vqa(folder, subtype="train2014"):
    questions = [
        {"image_id": 9, "question": "What is it?", "question_id": 9000},
        {"image_id": 9, "question": "How many?", "question_id": 9001},
        {"image_id": 581857, "question": "Is it red?", "question_id": 581857002},
    ]
    file = write(
        folder / f"v2_OpenEnded_mscoco_{subtype}_questions.json",
        {"info": {}, "task_type": "Open-Ended", "data_subtype": subtype, "questions": questions},
    )
    answers = {9000: ["broccoli", "broccoli", "food"], 581857002: ["yes"], 9001: ["2", "two", "2"]}
    annotations = [
        {
            "question_type": "what",
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(given, 1)],
            "answer_type": "other",
            "question_id": question_id,
        }
        for question_id, given in answers.items()
    ]
    return file, write(folder / f"v2_mscoco_{subtype}_annotations.json", {"annotations": annotations})


def test_vqa_finds_its_annotations_and_images(coco):
    file, _ = vqa(coco)
    for root in ("images", "images/train2014"):  # with the split's folder, or all images in one
        rows = load("vqa", train_file=file, image_root=coco / root)["train"]
        numbers = ("000000000009",) * 2 + ("000000581857",)
        assert names_of(rows) == [f"train2014/COCO_train2014_{number}.jpg" for number in numbers]
    assert rows["image_id"][:] == ["9", "9", "581857"]
    assert rows["question_id"][:] == ["9000", "9001", "581857002"]
    assert rows["question"][:] == ["What is it?", "How many?", "Is it red?"]
    assert rows["answers"][:] == [["broccoli", "broccoli", "food"], ["2", "two", "2"], ["yes"]]
    assert rows["kind"][:] == ["what"] * 3 and rows["answer_type"][:] == ["other"] * 3
    assert rows["source"][2] == "v2_OpenEnded_mscoco_train2014_questions.json row 3"


def test_faults_of_vqa_files(coco):
    file, annotations = vqa(coco)
    given = {"train_file": file, "image_root": coco / "images"}
    questions = json.loads(file.read_text())
    unanswered = {"image_id": 9, "question": "Why?", "question_id": 1}
    write(file, {**questions, "questions": [*questions["questions"], unanswered]})
    with pytest.raises(ValueError, match="row 4: no answer"):
        load("vqa", **given)
    write(file, {**questions, "questions": [*questions["questions"], {"image_id": 9}]})
    with pytest.raises(ValueError, match="row 3.*'question_id'"):
        load("vqa", **given)
    with pytest.raises(ValueError, match="'vqa'.*'captions'"):
        load("captions", **given)
    with pytest.raises(ValueError, match="--train_split"):
        load("vqa", **given, train_split="val")
    annotations.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=annotations.name):
        load("vqa", **given)
    annotations.unlink()
    with pytest.raises(FileNotFoundError, match=annotations.name):
        load("vqa", **given)


def test_vqa_test_dev_has_the_images_of_test(coco):
    """The questions have no answers; only the names of the images are checked."""
    file, _ = vqa(coco, "test-dev2015")
    _, record = next(iter(read_annotations(AnnotationFile(file, "val"), "vqa")))
    assert record["image"] == "test2015/COCO_test2015_000000000009.jpg"


# Captions


def test_coco_captions(coco):
    images = [
        {"id": 581857, "file_name": "COCO_train2014_000000581857.jpg"},
        {"id": 139, "file_name": "000000000139.jpg", "coco_url": "http://images.org/train2017/000000000139.jpg"},
    ]
    annotations = [
        {"image_id": 139, "id": 1, "caption": "A plate."},
        {"image_id": 581857, "id": 2, "caption": "A bear. "},
        {"image_id": 139, "id": 3, "caption": "Some food."},
    ]
    file = write(coco / "captions_train2014.json", {"info": {}, "images": images, "annotations": annotations})
    rows = load("captions", train_file=file, image_root=coco / "images")["train"]
    assert rows["caption"][:] == ["A plate.", "A bear.", "Some food."]
    assert rows["image_id"][:] == ["139", "581857", "139"]
    assert names_of(rows)[:2] == ["train2017/000000000139.jpg", "train2014/COCO_train2014_000000581857.jpg"]
    write(file, {"images": images[:1], "annotations": annotations})
    with pytest.raises(ValueError, match="COCO.* 139"):
        load("captions", train_file=file, image_root=coco / "images")


def karpathy(file, splits, **more):
    names = ["COCO_val2014_000000391895.jpg", "COCO_val2014_000000060623.jpg"]
    images = [
        {
            "filename": names[i % 2],
            "imgid": i,
            "split": split,
            "sentences": [{"raw": f"Caption {2 * i + j}.", "tokens": ["caption"]} for j in (0, 1)],
            **{key: value(i) for key, value in more.items()},
        }
        for i, split in enumerate(splits)
    ]
    return write(file, {"images": images, "dataset": "coco"})


def test_karpathy_splits(coco):
    more = {"filepath": lambda i: "val2014", "cocoid": lambda i: [391895, 60623][i % 2]}
    file = karpathy(coco / "dataset_coco.json", ["test", "restval", "val", "train"], **more)
    given = {"validation_file": file, "image_root": coco / "images"}
    loaded = load("captions", train_file=file, **given)
    train, validation = loaded["train"], loaded["validation"]
    assert train["caption"][:] == ["Caption 2.", "Caption 3.", "Caption 6.", "Caption 7."]
    assert train["image_id"][:] == ["60623"] * 4
    assert train["source"][:] == ["dataset_coco.json row 2"] * 2 + ["dataset_coco.json row 4"] * 2
    assert validation["caption"][:] == ["Caption 4.", "Caption 5."]
    assert names_of(validation) == ["val2014/COCO_val2014_000000391895.jpg"] * 2
    test = load("captions", **given, validation_split="test")
    assert test["validation"]["caption"][:] == ["Caption 0.", "Caption 1."]
    with pytest.raises(ValueError, match="'dev'.*--validation_split"):
        load("captions", **given, validation_split="dev")


def test_karpathy_of_flickr30k(coco):
    """Flickr30k has neither COCO's folders nor its numbers."""
    file = karpathy(coco / "dataset_flickr30k.json", ["train"])
    rows = load("captions", train_file=file, image_root=coco / "images" / "val2014")["train"]
    assert rows["image_id"][:] == ["0", "0"]
    assert names_of(rows)[0] == "val2014/COCO_val2014_000000391895.jpg"


# NLVR2


@pytest.mark.parametrize("folder", ["train/55", "55", "train", ""])
def test_nlvr2(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for side, width in ((0, 6), (1, 9)):
        PIL.Image.new("RGBA", (width, 5)).save(tmp_path / folder / f"train-10171-0-img{side}.png")
    lines = [
        {"sentence": f"About {label}.", "label": label, "identifier": f"train-10171-0-{i}", "directory": 55}
        for i, label in enumerate(("False", "True"))
    ]
    file = tmp_path / "train.json"  # the official files end with .json, and hold an object per line
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = load("nlvr2", train_file=file, image_root=tmp_path)["train"]
    assert rows["label"][:] == [0, 1] and rows["statement"][:] == ["About False.", "About True."]
    assert rows["question_id"][:] == ["train-10171-0-0", "train-10171-0-1"]
    assert rows["source"][0] == "train.json row 1"
    assert [image.size for image in rows[0]["images"]] == [(6, 5), (9, 5)]
    assert all(id_.endswith(f"train-10171-0-img{side}.png") for side, id_ in enumerate(rows[1]["image_ids"]))


# RefCOCO


def refcoco(folder, protocol):
    boxes = {1: [1.5, 2.0, 10.0, 20.5], 2: [0.0, 0.0, 40.0, 30.0]}
    images = [{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 40, "height": 30}]
    annotations = [{"id": i, "image_id": 581857, "category_id": 1, "bbox": box} for i, box in boxes.items()]
    write(folder / "instances.json", {"images": images, "annotations": annotations, "categories": []})
    sentences = {11: ["the left one", "left"], 12: ["the whole"], 13: ["it"]}
    refs = [
        {
            "ref_id": ref_id,
            "ann_id": ann_id,
            "image_id": 581857,
            "split": split,
            "sentences": [{"sent": text, "sent_id": 10 * ref_id + i} for i, text in enumerate(sentences[ref_id])],
        }
        for ref_id, ann_id, split in ((12, 2, "testA"), (11, 1, "train"), (13, 1, "val"))
    ]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol))
    return folder / "refs(unc).p"


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_refcoco(coco, protocol):
    file = refcoco(coco, protocol)
    given = {"validation_file": file, "image_root": coco / "images"}
    loaded = load("grounding", train_file=file, **given, validation_split="testA")
    train, (test,) = loaded["train"], loaded["validation"]
    assert train["expression"][:] == ["the left one", "left"]
    assert train["box"][:] == [[1.5, 2.0, 11.5, 22.5]] * 2  # x, y, width, height -> corners
    assert train["question_id"][:] == ["110", "111"]
    assert train["source"][:] == ["refs(unc).p row 2"] * 2
    assert (test["expression"], test["box"], test["image_id"]) == ("the whole", [0, 0, 40, 30], "581857")
    assert test["image"].size == (40, 30)
    assert load("grounding", **given)["validation"]["expression"][:] == ["it"]


def test_refcoco_needs_its_boxes(coco):
    given = {"train_file": refcoco(coco, 2), "image_root": coco / "images"}
    instances = write(coco / "instances.json", {"images": [], "annotations": [{"id": 1, "bbox": [0, 0, 1, 1]}]})
    with pytest.raises(ValueError, match="RefCOCO.*581857"):  # the changed file is read
        load("grounding", **given)
    instances.unlink()
    with pytest.raises(FileNotFoundError, match="instances.json"):
        load("grounding", **given)


# ALBEF's lists


@pytest.mark.parametrize(
    ("task", "record", "expected"),
    [
        ("captions", {"caption": ["One.", "Two."]}, {"caption": ["One.", "Two."]}),
        (
            "vqa",
            {"question": "What?", "question_id": 5, "answer": ["red", "red", "blue"], "dataset": "vqa"},
            {"question_id": ["5"], "answers": [["red", "red", "blue"]]},
        ),
        ("nlvr2", {"sentence": "Both.", "label": "True"}, {"statement": ["Both."], "label": [1]}),
    ],
)
def test_albef_lists(coco, task, record, expected):
    images = [f"train2014/COCO_train2014_{number}.jpg" for number in ("000000000009", "000000581857")]
    record = {"images": images, **record} if task == "nlvr2" else {"image": images[1], **record}
    rows = load(task, train_file=write(coco / "albef.json", [record]), image_root=coco / "images")["train"]
    assert {name: rows[name][:] for name in expected} == expected
    found = rows[0]["images"] if task == "nlvr2" else [rows[0]["image"]]
    assert [np.asarray(image)[0, 0, 0] // 10 for image in found] == [0, 5][-len(found) :]


# Pickles


class Hostile:
    """Object that makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
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


def test_pickle_of_plain_data_is_read(tmp_path):
    value = [{"a": [1, 2.5, "é", None, True]}, ("b",), 2**70, b"c"]
    for protocol in (3, 4, 5):
        (tmp_path / "file.p").write_bytes(pickle.dumps(value, protocol))
        assert read_plain_pickle(tmp_path / "file.p") == value
    (tmp_path / "file.p").write_bytes(b"(lp0\nS'caf\\xc3\\xa9'\np1\na.")  # as written by Python 2
    assert read_plain_pickle(tmp_path / "file.p") == ["café"]


@pytest.mark.parametrize(
    "content",
    [b"]r\xff\xff\xff\x0f.", b"]p4000000000\n.", b"\x80\x05B\xff\xff\xff\x0fabc.", b"\x80\x05\x95\xff\xff\xff\x0f]."],
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
