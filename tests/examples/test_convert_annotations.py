"""Annotation files in the official forms: their conversion has the rows of each task."""

import pytest
from loading import load
from PIL import Image

from trips_examples.convert_annotations import main


IMAGES = [
    "COCO_train2014_000000000009.jpg",
    "COCO_train2014_000000000025.jpg",
    "train2014/COCO_train2014_000000000009.jpg",
    "train2014/COCO_train2014_000000000025.jpg",
    "34/train-10171-0-img0.png",
    "34/train-10171-0-img1.png",
    "coco/train2017/000000000009.jpg",
]
QUESTIONS = """{"data_subtype": "train2014", "questions": [
    {"image_id": 9, "question": "What is it?", "question_id": 9000},
    {"image_id": 25, "question": "How many?", "question_id": 25001}
]}"""
NO_QUESTIONS = '{"data_subtype": "train2014", "questions": []}'
ANNOTATIONS = """{"data_subtype": "train2014", "annotations": [
    {"answers": [{"answer": "2", "answer_confidence": "yes"}, {"answer": "two", "answer_confidence": "yes"}],
     "image_id": 25, "answer_type": "number", "question_id": 25001}
]}"""
CAPTIONS = """{
    "images": [
        {"id": 9, "file_name": "COCO_train2014_000000000009.jpg"},
        {"id": 25, "file_name": "COCO_train2014_000000000025.jpg"}
    ],
    "annotations": [
        {"image_id": 25, "id": 1, "caption": "A giraffe."},
        {"image_id": 9, "id": 2, "caption": "Food."},
        {"image_id": 25, "id": 3, "caption": "Two giraffes."}
    ]
}"""
KARPATHY = """{"dataset": "coco", "images": [
    {"filepath": "train2014", "filename": "COCO_train2014_000000000009.jpg", "split": "restval",
     "sentences": [{"raw": "Food.", "sentid": 1}], "cocoid": 9},
    {"filepath": "train2014", "filename": "COCO_train2014_000000000025.jpg", "split": "val",
     "sentences": [{"raw": "Food.", "sentid": 1}], "cocoid": 25}
]}"""
STATEMENT = """{"sentence": "There are two dogs.", "left_url": "https://a/1.jpg", "right_url": "https://a/2.jpg", \
"identifier": "train-10171-0-0", "label": "LABEL", "directory": 34}
"""
STATEMENTS = STATEMENT.replace("LABEL", "False") + STATEMENT.replace("LABEL", "True")
INSTANCES = """{
    "info": {},
    "images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg"}],
    "annotations": [{"id": 7, "image_id": 9, "bbox": [1.0, 2.0, 3.0, 4.0]}],
    "categories": [{"id": 1, "name": "person"}]
}"""
REFS = """[{"ann_id": 7, "ref_id": 0, "image_id": 9, "split": "testA", "sentences": [
    {"raw": "THE LADY", "sent": "the lady"}, {"raw": "THE LADY", "sent": "left"}
]}]"""
CONVERSATIONS = """[
    {"id": "000000000009", "image": "coco/train2017/000000000009.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is it?"},
        {"from": "gpt", "value": "Food."},
        {"from": "human", "value": "Is it hot?"},
        {"from": "gpt", "value": "Yes."}
    ]},
    {"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
]"""
NO_QUESTION_FIRST = """[{"id": "000000000009", "image": "coco/train2017/000000000009.jpg", "conversations": [
    {"from": "gpt", "value": "a"}
]}]"""
# The task of the rows, the contents of the files, the name of the written file, and the expected rows.
CASES = {
    "vqa": (
        "vqa",
        {"questions.json": QUESTIONS, "annotations.json": ANNOTATIONS},
        "annotations.jsonl",
        [{"question": "How many?", "answers": ["2", "two"], "question_id": "25001", "kind": "number"}],
    ),
    "captions": (
        "captions",
        {"captions_train2014.json": CAPTIONS},
        "captions_train2014.jsonl",
        [{"caption": "Food."}, {"caption": "A giraffe."}, {"caption": "Two giraffes."}],
    ),
    "karpathy": ("captions", {"dataset_coco.json": KARPATHY}, "train.jsonl", [{"caption": "Food."}]),
    "nlvr2": (
        "nlvr2",
        {"train.json": STATEMENTS},
        "train.jsonl",
        [{"statement": "There are two dogs.", "label": label} for label in (0, 1)],
    ),
    "refcoco": (
        "grounding",
        {"instances.json": INSTANCES, "refs.json": REFS},
        "testA.jsonl",
        [{"expression": text, "box": [1, 2, 4, 6]} for text in ("the lady", "left")],
    ),
    "llava": (
        "vqa",
        {"llava.json": CONVERSATIONS},
        "llava.jsonl",
        [{"question": "What is it?", "answers": ["Food."]}, {"question": "Is it hot?", "answers": ["Yes."]}],
    ),
}


@pytest.fixture
def folder(tmp_path):
    for name in IMAGES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def write(folder, contents):
    for name, text in contents.items():
        (folder / name).write_text(text)
    return [str(folder / name) for name in contents]


@pytest.mark.parametrize("name", CASES)
def test_the_training_scripts_read_what_it_writes(folder, name):
    task, contents, written, expected = CASES[name]
    files = write(folder, contents)
    main(["--files", *files, "--output_dir", str(folder / "converted")])
    rows = load(task, train_file=folder / "converted" / written, image_root=folder)["train"]
    found = [{column: row[column] for column in expected[0]} for row in rows]
    assert found == expected
    with pytest.raises(FileExistsError):
        main(["--files", *files, "--output_dir", str(folder / "converted")])


@pytest.mark.parametrize(
    "contents, named",
    [
        ({"questions.json": QUESTIONS}, "annotations of VQAv2"),
        ({"captions.json": CAPTIONS, "refs.json": REFS}, "captions of COCO"),
        ({"rows.json": '[{"image": "a.png", "caption": "a"}]'}, "rows.json"),
        ({"empty.json": "[]"}, "empty.json"),
        ({"captions_train.json": CAPTIONS, "captions_val.json": CAPTIONS}, "captions of COCO and captions of COCO"),
        ({"questions.json": NO_QUESTIONS, "annotations.json": ANNOTATIONS}, "25001"),
        ({"instances.json": INSTANCES.replace('"id": 7', '"id": 8'), "refs.json": REFS}, "7"),
        ({"llava.json": NO_QUESTION_FIRST}, "000000000009"),
    ],
)
def test_files_that_do_not_fit_are_named(folder, contents, named):
    with pytest.raises(ValueError, match=named):
        main(["--files", *write(folder, contents), "--output_dir", str(folder / "converted")])
    assert not (folder / "converted").exists()
