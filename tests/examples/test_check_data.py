"""`check_data.py` reports what training stops at, by file and row. test_loading.py has each kind of bad row."""

import pytest
from datasets import Dataset
from loading import write
from PIL import Image
from strange_pictures import noise
from tiny_processors import make_bert_tokenizer

from trips_examples import run_vqa
from trips_examples.check_data import OPTIONS, check, main


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "c.jpg"):
        noise(40, 30).save(tmp_path / name)
    return tmp_path


def run(*arguments):
    """Return the faults and the notes."""
    args, *others = OPTIONS.parse_args_into_dataclasses(args=list(arguments))
    return check(args.task, *others)


def named(faults):
    return [f"{fault.source}: {fault.reason}" for fault in faults]


BOX = {"image": "a.png", "expression": "the dog", "box": [0, 0, 40, 30]}


def test_faults_and_notes_of_two_files(folder, capsys):
    rows = [
        {**BOX, "box": [5, 5, 42, 30]},
        BOX,
        {**BOX, "image": "b.png"},
        {**BOX, "image_id": "i"},
        {**BOX, "image_id": "i", "image": "b.png"},
    ]
    train_file = write(folder / "train.jsonl", rows)
    validation_file = write(folder / "val.jsonl", [BOX, {**BOX, "box": None}])
    options = ["--task=grounding", f"--train_file={train_file}", f"--validation_file={validation_file}"]
    faults, notes = run(*options)
    assert named(faults) == [
        "train.jsonl row 1: box outside the image",
        "train.jsonl row 5: image_id of two images",
        "val.jsonl row 2: no box",
    ]
    assert faults[0].detail == "[x0, y0, x1, y1] = [5.0, 5.0, 42.0, 30.0], the image is 40 x 30"
    _, train, validation, shared = notes  # the first: texts were not measured, there are no towers
    assert train == "train: 3 rows, 3 images, 1 different expressions"
    assert validation == "validation: 1 rows, 1 images, 1 different expressions"
    assert main(options) == 1
    printed = capsys.readouterr().out
    assert shared in printed
    for fault in faults:
        assert f"1 x {fault.reason}" in printed
        assert f"{fault.source}: {fault.reason} (" in printed
    good = write(folder / "good.jsonl", [BOX])
    assert main(["--task=grounding", f"--train_file={good}"]) == 0


def test_five_rows_of_a_kind_are_printed_and_the_task_of_their_columns(folder, capsys):
    rows = [{"image": "a.png", "caption": f"{number}"} for number in range(12)]
    file = write(folder / "t.jsonl", rows)
    assert main(["--task=vqa", "--preset=tiny", f"--train_file={file}"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("12 x no question\n")
    for number in range(1, 6):
        assert f"t.jsonl row {number}:" in printed
    assert "t.jsonl row 6:" not in printed
    assert "7 more" in printed


@pytest.mark.parametrize("has_bytes", [True, False])
def test_copies_of_an_image_in_several_splits_are_found_by_content(folder, has_bytes):
    """In an imagefolder, which has a file per split, and in Parquet, which has the content."""
    for split, names in (("train", ["a.png", "c.jpg"]), ("validation", ["b.png"])):  # b.png is a copy of a.png
        place = folder / "data" / split
        place.mkdir(parents=True)
        if has_bytes:
            contents = [(folder / name).read_bytes() for name in names]
            rows = Dataset.from_dict({"image": contents, "caption": ["a"] * len(names)})
            rows.to_parquet(place / f"{split}-0.parquet")
        else:
            for name in names:
                (folder / name).rename(place / name)
            write(place / "metadata.jsonl", [{"file_name": name, "caption": "a"} for name in names])
    faults, notes = run("--task=captions", "--preset=tiny", f"--dataset_name={folder / 'data'}")
    assert not faults
    (shared,) = [note for note in notes if "several splits" in note]
    assert shared.startswith("1 images")
    assert "train row 1" in shared
    assert "validation row 1" in shared


def test_answers_that_the_model_cannot_write_are_counted(folder, capsys):
    make_bert_tokenizer(["what is it? tea"]).save_pretrained(folder / "bert")
    answers = ["tea", "café", "大猩猩"]
    rows = [{"image": "a.png", "question": "what is it?", "answer": answer} for answer in answers]
    train_file = write(folder / "train.jsonl", rows)
    options = ["--task=vqa", "--preset=tiny", f"--train_file={train_file}", f"--tokenizer={folder / 'bert'}"]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "2 of the 3 answers" in printed and "大猩猩" in printed


def test_boxes_with_width_and_height_are_called_so(folder):
    boxes = [[20, 10, 15, 15], [0, 0, 12, 12], [5, 5, 42, 3]]  # of 40 x 30 pixels; the second fits
    train_file = write(folder / "train.jsonl", [{**BOX, "box": box} for box in boxes])
    (first, third), _ = run("--task=grounding", f"--train_file={train_file}")
    assert first.source == "train.jsonl row 1"
    assert "[x, y, width, height]" in first.detail
    assert third.source == "train.jsonl row 3"
    assert "[x, y, width, height]" not in third.detail


def test_a_run_from_scratch_and_the_check_measure_texts_alike(folder):
    """Without a tokenizer, both train the same one on the training split."""
    rows = [{"image": "a.png", "question": "red " * count, "answer": "blue"} for count in (62, 63)]
    file = write(folder / "rows.jsonl", rows)
    options = [f"--train_file={file}", f"--validation_file={file}", "--preset=tiny"]
    faults, _ = run("--task=vqa", *options)
    assert named(faults) == ["rows.jsonl row 2: more than 64 tokens"] * 2
    with pytest.raises(ValueError, match="rows.jsonl row 2: more than 64 tokens"):
        run_vqa.main([*options, f"--output_dir={folder / 'out'}"])


def test_images_smaller_than_a_patch_of_the_model(folder, checkpoints):
    for side in (7, 8):
        Image.new("RGB", (64, side)).save(folder / f"{side}.png")
    file = write(folder / "t.jsonl", [{"image": f"{side}.png", "caption": "a"} for side in (7, 8)])
    for model in ("--preset=tiny", f"--model={checkpoints['TripsForRetrieval']}"):  # both have patches of 8
        faults, _ = run("--task=captions", f"--train_file={file}", model)
        assert named(faults) == ["t.jsonl row 1: image smaller than a patch"]


def test_columns_may_have_own_names(folder):
    (folder / "train.csv").write_text("Bild;Frage;Antwort\na.png;Was?;rot\n", encoding="cp1252")
    options = ["--task=vqa", "--preset=tiny", f"--train_file={folder / 'train.csv'}"]
    faults, _ = run(*options, "--columns", "image=Bild", "question=Frage", "answer=Antwort")
    assert faults == []
    faults, _ = run(*options)
    assert any("--columns" in fault.detail for fault in faults)
    with pytest.raises(ValueError, match="Bild"):
        run(*options, "--columns", "Bild")


def test_values_of_rows_do_not_reach_the_terminal_as_they_are(folder, capsys):
    row = {"image": "a.png", "question": "what?", "answer": "red"}
    values = [
        {"image": "\x1b[2J\x1b]0;owned\x07.png"},
        {"image": "a\ntrain.jsonl row 9: no question.png"},
        {"image": "x" * 10_000_000},
        {"question": "x " * 20_000_000},
        {"answer": "[" * 100_000},
    ]
    file = write(folder / "t\x1b[31m.jsonl", [{**row, **value} for value in values])
    (folder / "deep.csv").write_text(f"image,question,answers\na.png,what?,{'[' * 100_000}\n")
    assert main(["--task=vqa", "--preset=tiny", f"--train_file={file}"]) == 1
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.splitlines())
    assert len(printed) < 5000
    for number in range(1, 6):
        assert printed.count(f"row {number}: ") == 1
    assert main(["--task=vqa", "--preset=tiny", f"--train_file={folder / 'deep.csv'}"]) == 1
    assert "deep.csv row 1: answers is not a JSON list" in capsys.readouterr().out
