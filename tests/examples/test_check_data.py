"""`check_data.py` reports what training stops at, by file and row. test_loading.py has each kind of bad row."""

import json

import numpy as np
import PIL.Image
import pytest

from trips_examples import run_vqa
from trips_examples.check_data import OPTIONS, check, main


@pytest.fixture
def folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for name in ("a.png", "b.png", "c.jpg"):
        PIL.Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


def write(file, records):
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(file)


def run(*arguments) -> tuple[list, list[str]]:
    """Return the faults and the notes."""
    args, *others = OPTIONS.parse_args_into_dataclasses(args=[*arguments])
    return check(args.task, *others)


def faults_of(faults):
    return [(fault.source, fault.reason) for fault in faults]


BOX = {"image": "a.png", "expression": "the dog", "box": [0, 0, 40, 30]}


def test_faults_and_notes_of_two_files(folder, capsys):
    rows = [
        {**BOX, "box": [5, 5, 42, 30]},
        BOX,
        {**BOX, "image": "b.png"},
        {**BOX, "image_id": "i"},
        {**BOX, "image_id": "i", "image": "b.png"},
    ]
    files = ["--train_file", write(folder / "train.jsonl", rows)]
    files += ["--validation_file", write(folder / "val.jsonl", [BOX, {**BOX, "box": None}])]
    faults, notes = run("--task", "grounding", *files)
    assert faults_of(faults) == [
        ("train.jsonl row 1", "box outside the image"),
        ("train.jsonl row 5", "image_id of two images"),
        ("val.jsonl row 2", "no box"),
    ]
    assert faults[0].detail == "[x0, y0, x1, y1] = [5.0, 5.0, 42.0, 30.0], the image is 40 x 30"
    _, train, validation, shared = notes  # the first: texts were not measured, there are no towers
    assert train == "train: 3 rows, 3 images, 1 different expressions"
    assert validation == "validation: 1 rows, 1 images, 1 different expressions"
    assert main(["--task", "grounding", *files]) == 1
    printed = capsys.readouterr().out
    assert "train.jsonl row 5: image_id of two images (" in printed and shared in printed
    assert all(f"1 x {fault.reason}" in printed for fault in faults)
    assert main(["--task", "grounding", "--train_file", write(folder / "good.jsonl", [BOX])]) == 0


def test_boxes_with_width_and_height_are_called_so(folder):
    boxes = [[20, 10, 15, 15], [30, 20, 5, 8], [0, 0, 12, 12], [5, 5, 42, 3]]  # of 40 x 30 pixels; the third fits
    train = write(folder / "t.jsonl", [{**BOX, "box": box} for box in boxes])
    faults, _ = run("--task", "grounding", "--train_file", train)
    called = {fault.source[-1]: "[x, y, width, height]" in fault.detail for fault in faults}
    assert called == {"1": True, "2": True, "4": False}


def test_a_run_from_scratch_and_the_check_measure_texts_alike(folder):
    """Without a tokenizer, both train the same one on the training split."""
    rows = [{"image": "a.png", "question": "red " * count, "answer": "blue"} for count in (62, 63)]
    files = [f"--{split}_file={write(folder / 'rows.jsonl', rows)}" for split in ("train", "validation")]
    files.append("--preset=tiny")
    faults, _ = run("--task", "vqa", *files)
    assert faults_of(faults) == [("rows.jsonl row 2", "more than 64 tokens")] * 2
    with pytest.raises(ValueError, match="rows.jsonl row 2: more than 64 tokens"):
        run_vqa.main([*files, "--output_dir", str(folder / "out")])


def test_images_smaller_than_a_patch_of_the_model(folder, checkpoints):
    for side in (7, 8):
        PIL.Image.new("RGB", (64, side)).save(folder / f"{side}.png")
    rows = write(folder / "t.jsonl", [{"image": f"{side}.png", "caption": "a"} for side in (7, 8)])
    for options in ([], ["--model", str(checkpoints["TripsForRetrieval"])]):  # the preset tiny has patches of 8, too
        faults, _ = run("--task", "captions", "--train_file", rows, *options)
        assert faults_of(faults) == [("t.jsonl row 1", "image smaller than a patch")]
