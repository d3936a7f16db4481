"""`check_data.py` reports what training stops at, by file and row. test_loading.py has each kind of bad row."""

import json

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset
from tiny_processors import make_bert_tokenizer

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


def test_five_rows_of_a_kind_are_printed_and_the_task_of_their_columns(folder, capsys):
    rows = [{"image": "a.png", "caption": f"{number}"} for number in range(12)]
    assert main(["--task", "vqa", "--preset", "tiny", "--train_file", write(folder / "t.jsonl", rows)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "12 x no question"
    assert [line.strip()[:13] for line in printed[1:6]] == [f"t.jsonl row {number}:"[:13] for number in range(1, 6)]
    assert "7 more" in printed[6]
    assert any("this looks like --task captions" in line for line in printed)
    assert "row 6" not in "".join(printed)


@pytest.mark.parametrize("has_bytes", [True, False])
def test_copies_of_an_image_in_several_splits_are_found_by_content(folder, has_bytes):
    """In an imagefolder, which has a file per split, and in Parquet, which has the content."""
    contents = {"train": ["a.png", "c.jpg"], "validation": ["b.png"]}  # b.png is a copy of a.png
    for split, names in contents.items():
        (folder / "data" / split).mkdir(parents=True)
        if has_bytes:
            rows = Dataset.from_dict(
                {"image": [(folder / name).read_bytes() for name in names], "caption": ["a"] * len(names)}
            )
            rows.to_parquet(folder / "data" / split / f"{split}-0.parquet")
            continue
        for name in names:
            (folder / name).rename(folder / "data" / split / name)
        write(folder / "data" / split / "metadata.jsonl", [{"file_name": name, "caption": "a"} for name in names])
    faults, notes = run("--task", "captions", "--preset", "tiny", "--dataset_name", str(folder / "data"))
    assert not faults
    (shared,) = [note for note in notes if "several splits" in note]
    assert shared.startswith("1 images") and "train row 1" in shared and "validation row 1" in shared


def test_answers_that_the_model_cannot_write_are_counted(folder, capsys):
    make_bert_tokenizer(["what is it? tea"]).save_pretrained(folder / "bert")
    answers = ["tea", "café", "大猩猩"]
    rows = [{"image": "a.png", "question": "what is it?", "answer": answer} for answer in answers]
    files = ["--train_file", write(folder / "t.jsonl", rows), "--validation_file", write(folder / "v.jsonl", rows[:1])]
    assert main(["--task", "vqa", "--preset", "tiny", "--tokenizer", str(folder / "bert"), *files]) == 0
    printed = capsys.readouterr().out
    assert "train: the model cannot write 2 of the 3 answers" in printed and "大猩猩" in printed
    assert "validation: the model" not in printed and "--text_model_name_or_path" in printed
    assert main(["--task", "vqa", "--preset", "tiny", *files]) == 0
    assert "cannot write" not in capsys.readouterr().out  # a tokenizer that is trained on the answers writes them


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
