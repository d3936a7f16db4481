"""`check_data.py` reports every fault by file and row in one run."""

import json
import subprocess
import sys

import datasets
import numpy as np
import PIL.Image
import pytest
from places import EXAMPLES
from transformers import AutoTokenizer

from trips_examples import run_vqa
from trips_examples.check_data import main
from trips_examples.data.loading import DataSource, load_task_dataset
from trips_examples.data.vocabulary import train_wordpiece_tokenizer


@pytest.fixture
def folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for name in ("a.png", "b.png", "c.jpg"):
        PIL.Image.fromarray(pixels).save(tmp_path / name)
    content = (tmp_path / "c.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(content[:-300])
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def write(file, records):
    file.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return str(file)


def run(folder, *arguments):
    """Return the exit code and the report."""
    report = folder / "report.json"
    code = main([*arguments, "--output_json", str(report)])
    return code, json.loads(report.read_text())


def faults_of(report):
    return [(fault["source"], fault["reason"]) for fault in report["faults"]]


BOX = {"image": "a.png", "expression": "the dog", "box": [0, 0, 40, 30]}


def test_every_fault_is_named(folder, capsys):
    train = write(
        folder / "train.jsonl",
        [
            BOX,
            {**BOX, "image": "none.png"},
            {**BOX, "image": "truncated.jpg"},
            {**BOX, "image": "text.png"},
            {**BOX, "expression": " "},
            '{"image": "a.png"',
            {**BOX, "box": [5, 5, 42, 30]},
            {**BOX, "box": [5, 5, 5, 30]},
            {**BOX, "box": [5, 5, "x", 30]},
            {**BOX, "question_id": "q"},
            {**BOX, "question_id": "q", "image": "b.png"},
            {**BOX, "box": [-0.5, 0, 40.5, 30]},
            {**BOX, "image_id": "i"},
            {**BOX, "image_id": "i", "image": "b.png"},
        ],
    )
    validation = write(folder / "val.jsonl", [BOX, {**BOX, "box": None}])
    code, report = run(folder, "--task", "grounding", "--train_file", train, "--validation_file", validation)
    assert code == 1
    assert faults_of(report) == [
        ("train.jsonl row 2", "missing image"),
        ("train.jsonl row 3", "unreadable image"),
        ("train.jsonl row 4", "unreadable image"),
        ("train.jsonl row 5", "no expression"),
        ("train.jsonl row 6", "broken JSON"),
        ("train.jsonl row 7", "box outside the image"),
        ("train.jsonl row 8", "box without area"),
        ("train.jsonl row 9", "box is not four numbers"),
        ("train.jsonl row 14", "image_id of two images"),
        ("val.jsonl row 2", "no box"),
    ]
    assert report["faults"][5]["detail"] == "[x0, y0, x1, y1] = [5.0, 5.0, 42.0, 30.0], the image is 40 x 30"
    assert report["splits"]["train"] == {"rows": 5, "images": 3, "different expressions": 1}
    assert report["splits"]["validation"] == {"rows": 1, "images": 1, "different expressions": 1}
    repeated, shared = report["notes"]
    assert "train: 1 question_ids" in repeated and shared.startswith("1 images")
    assert report["reasons"] == {"unreadable image": 2} | {
        reason: 1 for _, reason in faults_of(report) if "unr" not in reason
    }
    assert "train.jsonl row 3: unreadable image (" in capsys.readouterr().out


def test_boxes_with_width_and_height_are_called_so(folder, capsys):
    boxes = [[20, 10, 15, 15], [5, 20, 30, 10], [30, 20, 5, 8], [0, 0, 12, 12]]  # of 40 x 30 pixels; the last fits
    train = write(folder / "t.jsonl", [{**BOX, "box": box} for box in boxes])
    code, report = run(folder, "--task", "grounding", "--train_file", train)
    assert code == 1 and report["splits"]["train"]["rows"] == 1
    assert "[x, y, width, height]" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(ValueError, match=r"look like \[x, y, width, height\]"):
        load_task_dataset("grounding", DataSource(train_file=train))
    run(folder, "--task", "grounding", "--train_file", write(folder / "t.jsonl", [BOX, {**BOX, "box": [5, 5, 42, 3]}]))
    assert "width, height" not in capsys.readouterr().out


def test_a_file_of_another_task_is_called_so(folder):
    rows = [{"image": "a.png", "question": "what?", "answer": "red"}] * 30
    _, report = run(folder, "--task", "grounding", "--train_file", write(folder / "t.jsonl", rows))
    ((source, reason),) = faults_of(report)
    assert (source, reason) == ("t.jsonl", "cannot be read")
    assert "expression" in report["faults"][0]["detail"] and "'vqa'" in report["faults"][0]["detail"]


def test_missing_images_are_shown_up_to_a_limit_with_the_option_that_helps(folder, capsys):
    rows = [{"image": "none.png", "caption": str(i)} for i in range(30)]
    given = ["--task", "captions", "--train_file", write(folder / "t.jsonl", rows)]
    _, report = run(folder, *given)
    assert [source for source, _ in faults_of(report)] == [f"t.jsonl row {i}" for i in range(1, 31)] + ["train"]
    printed = capsys.readouterr().out
    assert printed.count(f"missing image ({folder}/none.png)") == 20 and "and 11 more" in printed
    assert "--image_root" in printed


def test_images_of_equal_bytes_are_one_image(folder, capsys):
    """Embedded images have no path. Rows of one image are grouped, and counted in both splits."""
    images = [{"bytes": (folder / name).read_bytes(), "path": None} for name in ("a.png", "c.jpg", "a.png")]
    columns = {"question": ["a", "b", "c"], "answer": ["x", "y", "z"]}
    data = datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())
    datasets.DatasetDict(train=data, validation=data.select([0])).save_to_disk(folder / "saved")
    code, report = run(folder, "--task", "vqa", "--dataset_name", str(folder / "saved"))
    assert code == 0
    assert [split["images"] for split in report["splits"].values()] == [2, 1]
    assert [note.startswith("1 images") for note in report["notes"]] == [True]


def test_a_test_file_is_checked_once(folder):
    files = [write(folder / f"{split}.jsonl", [BOX, {**BOX, "box": None}]) for split in ("train", "val", "test")]
    options = zip(("--train_file", "--validation_file", "--test_file"), files)
    _, report = run(folder, "--task", "grounding", *(word for option in options for word in option))
    assert faults_of(report) == [(f"{split}.jsonl row 2", "no box") for split in ("train", "val", "test")]


def test_a_file_that_cannot_be_read_does_not_hide_the_other(folder):
    broken = folder / "train.json"
    broken.write_text("[{]")
    validation = write(
        folder / "val.jsonl", [{"image": "none.png", "caption": "a"}, {"image": "a.png", "caption": "b"}]
    )
    code, report = run(folder, "--task", "captions", "--train_file", str(broken), "--validation_file", validation)
    assert code == 1
    assert faults_of(report) == [("train.json", "cannot be read"), ("val.jsonl row 1", "missing image")]
    assert "train.json" in report["faults"][0]["detail"]
    assert report["splits"]["validation"]["rows"] == 1


def test_a_run_from_scratch_and_the_check_measure_texts_alike(folder):
    """Without a tokenizer, both train the same one on the training split."""
    rows = [{"image": "a.png", "question": "red " * count, "answer": "blue"} for count in (62, 63)]
    files = [f"--{split}_file={write(folder / 'rows.jsonl', rows)}" for split in ("train", "validation")]
    _, report = run(folder, "--task", "vqa", *files)
    assert faults_of(report) == [("rows.jsonl row 2", "more than 64 tokens")] * 2
    with pytest.raises(ValueError, match="rows.jsonl row 2: more than 64 tokens"):
        run_vqa.main([*files, "--output_dir", str(folder / "out")])


def test_unknown_words_are_told_and_no_fault(folder, capsys):
    train_wordpiece_tokenizer(["what color is it? red"]).save_pretrained(folder / "tokenizer")
    rows = [{"image": "a.png", "question": "what color is it?", "answer": answer} for answer in ("red", "zyx")]
    given = ["--task", "vqa", "--train_file", write(folder / "t.jsonl", rows)]
    code, report = run(folder, *given, "--tokenizer_name", str(folder / "tokenizer"))
    assert code == 0 and report["faults"] == []
    told = "train: 1 different answers hold words that the tokenizer does not know, e.g. 'zyx'"
    assert report["notes"] == [told] and told in capsys.readouterr().out


def test_answers_that_training_never_sees_are_told_and_no_fault(folder, capsys):
    def rows(name, *answers) -> str:
        rows = [{"image": "a.png", "question": "?", "answers": each} for each in answers]
        return write(folder / name, rows)

    files = ["--train_file", rows("t.jsonl", ["A dog."], ["two"])]
    given = [*files, "--validation_file", rows("v.jsonl", ["dog"], ["2"], ["frog", "dog"], ["frog"], ["cat"])]
    code, report = run(folder, "--task", "vqa", *given)
    assert code == 0
    (told,) = (note for note in report["notes"] if "questions" in note)
    assert (
        told.startswith("validation: 2 of 5 questions") and "'frog', 'cat'" in told and told in capsys.readouterr().out
    )


def test_images_smaller_than_a_patch_of_the_model(folder, checkpoints):
    sides = (7, 8, 15, 16)
    for side in sides:
        PIL.Image.new("RGB", (64, side)).save(folder / f"{side}.png")
    rows = [{"image": f"{side}.png", "caption": "a"} for side in sides]
    given = ["--task", "captions", "--train_file", write(folder / "t.jsonl", rows)]
    checkpoint, tokenizer = str(checkpoints["TripsForRetrieval"]), str(folder / "tokenizer")  # patches of 8
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tokenizer)
    base = ["--preset", "base"]  # patches of 16
    for options, bad in (
        ([], (1,)),  # the preset tiny, as in run_vqa.py
        (["--tokenizer_name", tokenizer, *base], (1, 2, 3)),
        (["--model_name_or_path", checkpoint, *base], (1,)),
    ):
        _, report = run(folder, *given, *options)
        assert faults_of(report) == [(f"t.jsonl row {row}", "image smaller than a patch") for row in bad]


@pytest.mark.slow
def test_exit_code_of_the_process(folder):
    file = write(folder / "train.jsonl", [{"image": "truncated.jpg", "caption": "a"}])
    command = [sys.executable, str(EXAMPLES / "check_data.py"), "--task", "captions", "--train_file", file]
    assert subprocess.run(command).returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "captions", "nlvr2", "grounding"])
def test_bundled_data(folder, task):
    code, report = run(folder, "--task", task)
    assert code == 0
    assert report["splits"]["train"]["images"] == (8000 if task == "nlvr2" else 4000)
