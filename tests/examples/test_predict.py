"""`predict.py`: every photo with every question, for all tasks, also in two processes and after it is killed."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from archives import write_tar
from killed import kill_when
from PIL import Image
from places import EXAMPLES
from tiny_collection import encoded, write_images, write_parquet

import modeling_trips
from modeling_trips import TripsProcessor, TripsVisualQuestionAnsweringPipeline
from trips_examples import predict


QUESTIONS = ["what color is it?", "is it a circle?"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder of photos: 0.png, which is broken, 1.png and 2.png."""
    folder = write_images(tmp_path_factory.mktemp("photos"), range(3))
    (folder / "0.png").write_bytes(b"no image")
    return folder


def rows_of(output):
    if output.suffix == ".parquet":
        return pyarrow.parquet.read_table(output).to_pylist()
    text = output.read_text(encoding="utf-8-sig")
    if output.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return [{name: cell or None for name, cell in row.items()} for row in csv.DictReader(text.splitlines())]


def words(model, images, output, *options):
    return list(map(str, ["--model", model, "--images", images, "--output", output, *options]))


def run(*given):
    predict.main(words(*given))


def loaded(folder):
    model = getattr(modeling_trips, folder.name).from_pretrained(folder).eval()
    return model, TripsProcessor.from_pretrained(folder)


@pytest.mark.parametrize("suffix", predict.FORMATS)
def test_every_photo_has_the_answer_of_the_pipeline_to_every_question(suffix, photos, checkpoints, tmp_path):
    folder = checkpoints["TripsForQuestionAnswering"]
    output = tmp_path / f"answers{suffix}"
    run(folder, photos, output, "--questions", *QUESTIONS, "--batch_size", "2")
    model, processor = loaded(folder)
    pipeline = TripsVisualQuestionAnsweringPipeline(model=model, processor=processor)
    broken, *rows = rows_of(output)
    assert broken["image"] == str(photos / "0.png") and broken["error"].startswith("unreadable image")
    assert broken["question"] is broken["answer"] is broken["confidence"] is None
    expected = [(str(photos / name), question) for name in ("1.png", "2.png") for question in QUESTIONS]
    assert [(row["image"], row["question"]) for row in rows] == expected
    for row in rows:
        (best,) = pipeline(image=row["image"], question=row["question"], top_k=1)
        assert (row["answer"] or "") == best["answer"] and row["error"] is None
        assert float(row["confidence"]) == pytest.approx(best["score"], abs=1e-4)
    run(folder, photos, tmp_path / "unsure.csv", "--questions", "what 色", "--threshold", "1.1")
    _, *rows = rows_of(tmp_path / "unsure.csv")
    assert {(row["answer"], row["unknown_words"]) for row in rows} == {("unsure", "[UNK]")}


def test_captions_of_encoded_photos(checkpoints, tmp_path):
    folder = checkpoints["TripsForConditionalGeneration"]
    tar = write_tar(tmp_path / "shard.tar", {"a.png": encoded(1), "b.png": encoded(2)})
    table = write_parquet(tmp_path / "table.parquet", [3])
    run(folder, table, tmp_path / "out.jsonl")
    run(folder, tar, tmp_path / "tar.jsonl")
    (row,) = rows_of(tmp_path / "out.jsonl")
    model, processor = loaded(folder)
    image = write_images(tmp_path / "same", [3]) / "3.png"
    inputs = processor(images=str(image), text="a picture of ", return_tensors="pt")
    assert row["caption"] == processor.post_process_answers(model.generate(**inputs))[0]
    assert [Path(row["image"]).name for row in rows_of(tmp_path / "tar.jsonl")] == ["a", "b"]


def test_boxes_are_in_pixels_of_each_photo(photos, checkpoints, tmp_path):
    folder = checkpoints["TripsForVisualGrounding"]
    wide = tmp_path / "wide.png"
    Image.new("RGB", (50, 20), "red").save(wide)
    (tmp_path / "rows.csv").write_text(f"image\nwide.png\n{photos}/1.png\n")
    (tmp_path / "asked.txt").write_text("it\n\nwhat color\nit\n")
    output = tmp_path / "boxes.parquet"
    run(folder, tmp_path / "rows.csv", tmp_path / "old.csv", "--questions_file", tmp_path / "asked.txt")
    Image.new("RGB", (200, 50), "red").save(wide)  # a photo that changes is looked at again
    run(folder, tmp_path / "rows.csv", output, "--questions_file", tmp_path / "asked.txt")
    rows = rows_of(output)
    assert [row["expression"] for row in rows] == ["it", "what color"] * 2
    model, processor = loaded(folder)
    for row in rows:
        image = Image.open(row["image"])
        inputs = processor(images=image, text=row["expression"], return_tensors="pt")
        with torch.no_grad():
            box = processor.post_process_grounding(model(**inputs), [(image.height, image.width)])[0]
        torch.testing.assert_close(
            torch.tensor([row[name] for name in ("x0", "y0", "x1", "y1")]), box, atol=0.01, rtol=0
        )


def test_statements_are_judged_for_pairs_of_photos(photos, checkpoints, tmp_path):
    folder = checkpoints["TripsForImagesAndTextClassification"]
    (tmp_path / "pairs.csv").write_text("left_image,right_image\n1.png,2.png\n1.png,0.png\n2.png,\n")
    output = tmp_path / "true.csv"
    options = ["--image_root", photos, "--questions", *QUESTIONS]
    run(folder, tmp_path / "pairs.csv", output, *options)
    *rows, broken, alone = rows_of(output)
    assert broken["error"].startswith("unreadable image") and alone["error"].startswith("no image")
    model, processor = loaded(folder)
    for row, statement in zip(rows, QUESTIONS, strict=True):
        images = row["image"].split("|")
        inputs = processor(images=images, text=[statement], image_index=[[0, 1]], return_tensors="pt")
        with torch.no_grad():
            probabilities = model(**inputs).logits.softmax(dim=-1)[0]
        assert row["statement"] == statement and int(row["label"]) == int(probabilities.argmax())
        assert float(row["confidence"]) == pytest.approx(probabilities.max().item(), abs=1e-4)


@pytest.mark.slow
def test_a_killed_run_goes_on_in_two_processes_and_loses_and_doubles_nothing(checkpoints, tmp_path, monkeypatch):
    numbers = range(300)  # two shards
    photos = write_images(tmp_path / "photos", numbers)
    output = tmp_path / "answers.csv"
    given = words(checkpoints["TripsForQuestionAnswering"], photos, output, "--questions", *QUESTIONS)
    script = str(EXAMPLES / "predict.py")

    def kept():
        """Return when each whole part was written."""
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/generator/*/0.0.0/*.arrow")}

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    kill_when(lambda: len(kept()) > 1, [sys.executable, script, *given])
    before = kept()
    assert 1 < len(before) < 5 and not output.exists()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([sys.executable, *launcher, script, *given], check=True)
    assert before.items() <= kept().items()
    expected = {(str(photos / f"{number}.png"), question) for number in numbers for question in QUESTIONS}
    found = [(row["image"], row["question"]) for row in rows_of(output)]
    assert len(found) == len(expected) and set(found) == expected
    refused = subprocess.run([sys.executable, script, *given], capture_output=True, text=True)
    assert refused.returncode == 2 and "answers.csv exists" in refused.stderr


@pytest.mark.parametrize(
    "model, images, options, error",
    [
        ("TripsForRetrieval", "photos", ["--questions", "x"], "TripsForQuestionAnswering"),
        ("TripsForQuestionAnswering", "empty", ["--questions", "x"], "empty has no file"),
        ("TripsForQuestionAnswering", "gone", ["--questions", "x"], "gone does not exist"),
        ("TripsForQuestionAnswering", "rows.csv", ["--questions", "x"], "rows.csv has no rows"),
        ("TripsForQuestionAnswering", "photos", ["--questions_file", "rows.csv"], "rows.csv has none"),
        ("TripsForQuestionAnswering", "photos", [], "--questions"),
        ("TripsForQuestionAnswering", "photos", ["--questions", "x", "x " * 600], r"text\[1\]"),
        ("TripsForQuestionAnswering", "bad", ["--questions", "x"], "No photo could be used"),
        ("TripsForImagesAndTextClassification", "photos", ["--questions", "x"], "left_image"),
    ],
)
def test_bad_input_is_named(model, images, options, error, photos, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(photos)
    Path("empty").mkdir()
    Path("bad").mkdir()
    Path("bad/1.jpg").touch()
    Path("rows.csv").write_text("image,question\n")
    with pytest.raises((ValueError, OSError), match=error):
        run(checkpoints[model], images, "out.csv", *options)
    assert Path("out.csv").exists() == (images == "bad")
