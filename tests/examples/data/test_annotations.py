"""Annotation files of public data sets: small files of the same form."""

import contextlib
import json
import os
import pickle
import re
from resource import RUSAGE_SELF, getrusage

import PIL.Image
import pytest
from loading import load

from trips_examples.data.annotations import read_annotations, read_plain_pickle
from trips_examples.data.source import AnnotationFile


@pytest.fixture
def coco(tmp_path):
    """Write images of 40 x 30 pixels with COCO's names and folders."""
    names = ["train2014/COCO_train2014_000000000009.jpg", "train2014/COCO_train2014_000000581857.jpg"]
    names += ["val2014/COCO_val2014_000000391895.jpg", "val2014/COCO_val2014_000000060623.jpg"]
    for name in [*names, "train2017/000000000139.jpg"]:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (40, 30)).save(tmp_path / "images" / name)
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
        {"image_id": 581857, "question": "Is it red?", "question_id": 581857002},
    ]
    file = write(
        folder / f"v2_OpenEnded_mscoco_{subtype}_questions.json",
        {"info": {}, "task_type": "Open-Ended", "data_subtype": subtype, "questions": questions},
    )
    answers = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(("2", "two", "2"), 1)]
    about = {"question_type": "what", "answer_type": "other"}
    annotations = [
        {**about, "answers": answers[:1], "question_id": 581857002},
        {**about, "answers": answers, "question_id": 9000},
    ]
    return file, write(folder / f"v2_mscoco_{subtype}_annotations.json", {"annotations": annotations})


def test_vqa_finds_its_annotations_and_images(coco):
    file, _ = vqa(coco)
    for root in ("images", "images/train2014"):  # with the split's folder, or all images in one
        rows = load("vqa", train_file=file, image_root=coco / root)["train"]
        numbers = ("000000000009", "000000581857")
        assert names_of(rows) == [f"train2014/COCO_train2014_{number}.jpg" for number in numbers]
    assert rows["image_id"][:] == ["9", "581857"]
    assert rows["question_id"][:] == ["9000", "581857002"]
    assert rows["question"][:] == ["What is it?", "Is it red?"]
    assert rows["answers"][:] == [["2", "two", "2"], ["2"]]
    assert rows["kind"][:] == ["what"] * 2 and rows["answer_type"][:] == ["other"] * 2
    assert rows["source"][1] == "v2_OpenEnded_mscoco_train2014_questions.json row 2"


def test_faults_of_vqa_files(coco):
    file, annotations = vqa(coco)
    given = {"train_file": file, "image_root": coco / "images"}
    questions = json.loads(file.read_text())
    for question, fault in (
        ({"image_id": 9, "question": "Why?", "question_id": 1}, "row 3: no answer"),
        ({"image_id": 9}, "row 2.*'question_id'"),
    ):
        write(file, {**questions, "questions": [*questions["questions"], question]})
        with pytest.raises(ValueError, match=fault):
            load("vqa", **given)
    with pytest.raises(ValueError, match="captions"):
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
    with pytest.raises(ValueError, match="COCO.*139"):
        load("captions", train_file=file, image_root=coco / "images")


def karpathy(file, splits, **more):
    names = ["COCO_val2014_000000391895.jpg", "COCO_val2014_000000060623.jpg"]
    images = [{"filename": names[i % 2], "imgid": i, "split": split, **more} for i, split in enumerate(splits)]
    for i, image in enumerate(images):
        image["sentences"] = [{"raw": f"{i}."}, {"raw": f"{i}!"}]
    return write(file, {"images": images, "dataset": "coco"})


def test_karpathy_splits(coco):
    more = {"filepath": "val2014", "cocoid": 77}
    file = karpathy(coco / "dataset_coco.json", ["test", "restval", "val", "train"], **more)
    given = {"validation_file": file, "image_root": coco / "images"}
    loaded = load("captions", train_file=file, **given, skip_bad_rows=True)
    train, validation = loaded["train"], loaded["validation"]
    assert train["caption"][:] == ["1.", "1!", "3.", "3!"]
    assert train["image_id"][:] == ["77"] * 4
    assert train["source"][:] == ["dataset_coco.json row 2"] * 2 + ["dataset_coco.json row 4"] * 2
    assert validation["caption"][:] == ["2.", "2!"]
    assert names_of(validation) == ["val2014/COCO_val2014_000000391895.jpg"] * 2
    test = load("captions", **given, validation_split="test")
    assert test["validation"]["caption"][:] == ["0.", "0!"]
    with pytest.raises(ValueError, match="'dev'.*--validation_split"):
        load("captions", **given, validation_split="dev")


def test_karpathy_of_flickr30k(coco):
    """Flickr30k has neither COCO's folders nor its numbers."""
    file = karpathy(coco / "dataset_flickr30k.json", ["train"])
    rows = load("captions", train_file=file, image_root=coco / "images" / "val2014")["train"]
    assert rows["image_id"][:] == ["0", "0"]
    assert names_of(rows)[0] == "val2014/COCO_val2014_000000391895.jpg"


# NLVR2


@pytest.mark.parametrize("folder", ["train/55", ""])
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


def refcoco(folder):
    boxes = {1: [1.5, 2.0, 10.0, 20.5], 2: [0.0, 0.0, 40.0, 30.0]}
    images = [{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 40, "height": 30}]
    annotations = [{"id": number, "image_id": 581857, "bbox": box} for number, box in boxes.items()]
    write(folder / "instances.json", {"images": images, "annotations": annotations})
    refs = []
    for ann_id, split, texts in ((2, "testA", ["whole"]), (1, "train", ["the left one", "left"]), (1, "val", ["it"])):
        sentences = [{"sent": text, "sent_id": 10 * ann_id + i} for i, text in enumerate(texts)]
        refs.append({"ref_id": 7, "ann_id": ann_id, "image_id": 581857, "split": split, "sentences": sentences})
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, 0))
    return folder / "refs(unc).p"


def test_refcoco(coco):
    file = refcoco(coco)
    given = {"validation_file": file, "image_root": coco / "images"}
    loaded = load("grounding", train_file=file, **given, validation_split="testA")
    train, (test,) = loaded["train"], loaded["validation"]
    assert train["expression"][:] == ["the left one", "left"]
    assert train["box"][:] == [[1.5, 2.0, 11.5, 22.5]] * 2  # x, y, width, height -> corners
    assert train["question_id"][:] == ["10", "11"]
    assert train["source"][:] == ["refs(unc).p row 2"] * 2
    assert (test["expression"], test["box"], test["image_id"]) == ("whole", [0, 0, 40, 30], "581857")
    assert test["image"].size == (40, 30)
    assert load("grounding", **given)["validation"]["expression"][:] == ["it"]


def test_refcoco_needs_its_boxes(coco):
    given = {"train_file": refcoco(coco), "image_root": coco / "images"}
    instances = write(coco / "instances.json", {"images": [], "annotations": [{"id": 1, "bbox": [0, 0, 1, 1]}]})
    with pytest.raises(ValueError, match="RefCOCO.*581857"):  # the changed file is read
        load("grounding", **given)
    instances.unlink()
    with pytest.raises(FileNotFoundError, match="instances.json"):
        load("grounding", **given)


# Pickles


class Hostile:
    """Object that makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", [0, 2, 5])
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
    (tmp_path / "file.p").write_bytes(b"(lp0\nS'caf\\xc3\\xa9'\np1\na.")  # as written by Python 2
    assert read_plain_pickle(tmp_path / "file.p") == ["café"]


@pytest.mark.parametrize("content", [b"]r\xff\xff\xff\x0f.", b"\x80\x05B\xff\xff\xff\x0fabc."])
def test_a_small_pickle_takes_little_memory(tmp_path, content):
    """The pickles claim a large memo index or length."""
    file = tmp_path / "file.p"
    file.write_bytes(content)
    peak = getrusage(RUSAGE_SELF).ru_maxrss  # KiB
    with contextlib.suppress(ValueError):
        read_plain_pickle(file)
    assert getrusage(RUSAGE_SELF).ru_maxrss - peak < 2**16
