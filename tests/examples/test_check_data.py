"""`check_data.py` reports what training stops at, by file and row. test_checking.py has each kind of bad row."""

import json

import datasets
import numpy as np
import PIL.Image
import pytest
from transformers import AutoTokenizer

from trips_examples import run_vqa
from trips_examples.check_data import main
from trips_examples.data.loading import DataSource, load_task_dataset
from trips_examples.data.vocabulary import train_tokenizer


@pytest.fixture
def folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for name in ("a.png", "b.png", "c.jpg"):
        PIL.Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


def write(file, records):
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(file)


def run(folder, *arguments):
    """Return the exit code and the report."""
    report = folder / "report.json"
    code = main([*arguments, "--output_json", str(report)])
    return code, json.loads(report.read_text())


def faults_of(report):
    return [(fault["source"], fault["reason"]) for fault in report["faults"]]


BOX = {"image": "a.png", "expression": "the dog", "box": [0, 0, 40, 30]}


def test_faults_and_notes_of_two_files(folder, capsys):
    rows = [
        {**BOX, "box": [5, 5, 42, 30]},
        {**BOX, "question_id": "q"},
        {**BOX, "question_id": "q", "image": "b.png"},
        {**BOX, "image_id": "i"},
        {**BOX, "image_id": "i", "image": "b.png"},
    ]
    files = ["--train_file", write(folder / "train.jsonl", rows)]
    files += ["--validation_file", write(folder / "val.jsonl", [BOX, {**BOX, "box": None}])]
    code, report = run(folder, "--task", "grounding", *files)
    assert code == 1
    assert faults_of(report) == [
        ("train.jsonl row 1", "box outside the image"),
        ("train.jsonl row 5", "image_id of two images"),
        ("val.jsonl row 2", "no box"),
    ]
    assert report["faults"][0]["detail"] == "[x0, y0, x1, y1] = [5.0, 5.0, 42.0, 30.0], the image is 40 x 30"
    assert report["splits"]["train"] == {"rows": 3, "images": 3, "different expressions": 1}
    assert report["splits"]["validation"] == {"rows": 1, "images": 1, "different expressions": 1}
    assert report["reasons"] == {reason: 1 for _, reason in faults_of(report)}
    repeated, shared = report["notes"]
    assert "train: 1 question_ids" in repeated and shared.startswith("1 images")
    printed = capsys.readouterr().out
    assert "train.jsonl row 5: image_id of two images (" in printed and repeated in printed


def test_boxes_with_width_and_height_are_called_so(folder, capsys, caplog):
    boxes = [[20, 10, 15, 15], [5, 20, 30, 10], [30, 20, 5, 8], [0, 0, 12, 12]]  # of 40 x 30 pixels; the last fits
    train = write(folder / "t.jsonl", [{**BOX, "box": box} for box in boxes])
    code, report = run(folder, "--task", "grounding", "--train_file", train)
    assert code == 1 and report["splits"]["train"]["rows"] == 1
    assert "[x, y, width, height]" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(ValueError, match=r"look like \[x, y, width, height\]"):
        load_task_dataset("grounding", DataSource(train_file=train))
    load_task_dataset("grounding", DataSource(train_file=train), skip_bad_rows=True)
    assert "look like [x, y, width, height]" in caplog.text
    run(folder, "--task", "grounding", "--train_file", write(folder / "t.jsonl", [BOX, {**BOX, "box": [5, 5, 42, 3]}]))
    assert "width, height" not in capsys.readouterr().out


def test_a_file_of_another_task_is_called_so(folder):
    rows = [{"image": "a.png", "question": "what?", "answer": "red"}] * 30
    _, report = run(folder, "--task", "grounding", "--train_file", write(folder / "t.jsonl", rows))
    assert faults_of(report) == [("t.jsonl", "cannot be read")]
    assert "expression" in report["faults"][0]["detail"] and "'vqa'" in report["faults"][0]["detail"]


def test_missing_images_are_shown_up_to_a_limit_with_the_option_that_helps(folder, capsys):
    rows = [{"image": "none.png", "caption": str(i)} for i in range(30)]
    _, report = run(folder, "--task", "captions", "--train_file", write(folder / "t.jsonl", rows))
    assert [source for source, _ in faults_of(report)] == [f"t.jsonl row {i}" for i in range(1, 31)] + ["train"]
    printed = capsys.readouterr().out
    assert printed.count(f"missing image ({folder}/none.png)") == 20 and "and 11 more" in printed
    assert "--image_root" in printed


def test_images_of_equal_bytes_are_one_image(folder):
    """Embedded images have no path. Rows of one image are grouped, and counted in both splits."""
    images = [{"bytes": (folder / name).read_bytes(), "path": None} for name in ("a.png", "c.jpg", "a.png")]
    columns = {"question": ["a", "b", "c"], "answer": ["x", "y", "z"]}
    data = datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())
    datasets.DatasetDict(train=data, validation=data.select([0])).save_to_disk(folder / "saved")
    code, report = run(folder, "--task", "vqa", "--dataset_name", str(folder / "saved"))
    assert code == 0 and [note.startswith("1 images") for note in report["notes"]] == [True]
    assert [split["images"] for split in report["splits"].values()] == [2, 1]


def test_a_file_that_cannot_be_read_does_not_hide_the_other(folder):
    (folder / "train.json").write_text("[{]")
    rows = [{"image": "none.png", "caption": "a"}, {"image": "a.png", "caption": "b"}]
    files = ["--train_file", str(folder / "train.json"), "--validation_file", write(folder / "val.jsonl", rows)]
    code, report = run(folder, "--task", "captions", *files)
    assert code == 1
    assert faults_of(report) == [("train.json", "cannot be read"), ("val.jsonl row 1", "missing image")]
    assert report["splits"]["validation"]["rows"] == 1


def test_a_run_from_scratch_and_the_check_measure_texts_alike(folder):
    """Without a tokenizer, both train the same one on the training split."""
    rows = [{"image": "a.png", "question": "red " * count, "answer": "blue"} for count in (62, 63)]
    files = [f"--{split}_file={write(folder / 'rows.jsonl', rows)}" for split in ("train", "validation")]
    _, report = run(folder, "--task", "vqa", *files)
    assert faults_of(report) == [("rows.jsonl row 2", "more than 64 tokens")] * 2
    with pytest.raises(ValueError, match="rows.jsonl row 2: more than 64 tokens"):
        run_vqa.main([*files, "--output_dir", str(folder / "out")])


def test_words_that_a_tokenizer_does_not_know_are_told_and_no_fault(folder, capsys):
    """Models cannot learn such an answer: it is [UNK], which decodes to an empty text."""
    train_tokenizer(["what color is it? red"]).save_pretrained(folder / "tokenizer")
    rows = [{"image": "a.png", "question": "what color is it?", "answer": answer} for answer in ("red", "zyx")]
    given = ["--task", "vqa", "--train_file", write(folder / "t.jsonl", rows)]
    code, report = run(folder, *given, "--tokenizer", str(folder / "tokenizer"))
    assert code == 0 and report["faults"] == []
    told = "train: 1 different answers hold words that the tokenizer does not know, e.g. 'zyx'"
    assert report["notes"] == [told] and told in capsys.readouterr().out


def test_answers_that_training_never_sees_are_told_and_no_fault(folder):
    def rows(name, *answers) -> str:
        rows = [{"image": "a.png", "question": "?", "answers": each} for each in answers]
        return write(folder / name, rows)

    given = ["--train_file", rows("t.jsonl", ["A dog."], ["two"])]
    given += ["--validation_file", rows("v.jsonl", ["dog"], ["2"], ["frog", "dog"], ["frog"], ["cat"])]
    code, report = run(folder, "--task", "vqa", *given)
    assert code == 0
    (told,) = (note for note in report["notes"] if "questions" in note)
    assert told.startswith("validation: 2 of 5 questions") and "'frog', 'cat'" in told


def test_images_smaller_than_a_patch_of_the_model(folder, checkpoints):
    for side in (7, 8, 15, 16):
        PIL.Image.new("RGB", (64, side)).save(folder / f"{side}.png")
    rows = [{"image": f"{side}.png", "caption": "a"} for side in (7, 8, 15, 16)]
    given = ["--task", "captions", "--train_file", write(folder / "t.jsonl", rows)]
    checkpoint, tokenizer = str(checkpoints["TripsForRetrieval"]), str(folder / "tokenizer")  # patches of 8
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tokenizer)
    for options, bad in (
        ([], (1,)),  # the preset tiny, as in run_vqa.py
        (["--tokenizer", tokenizer, "--preset", "base"], (1, 2, 3)),  # patches of 16
        (["--model", checkpoint], (1,)),
    ):
        _, report = run(folder, *given, *options)
        assert faults_of(report) == [(f"t.jsonl row {row}", "image smaller than a patch") for row in bad]
