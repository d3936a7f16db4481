"""`benchmarks/images/make_scenes.py`: composed scenes of named images, with questions and expressions."""

import random

import make_scenes
import PIL.Image
from make_scenes import Picture, Thing, expressions, place_things, questions, read_pictures

from trips_examples.data.loading import DataArguments, load_task_dataset


COLORS = ("red", "blue", "green", "white", "black")
SIZES = {"bar": (40, 10), "card": (24, 30)}


def write_pictures(folder):
    """Write plain shapes with a transparent border, and files that cannot be used."""
    for color in COLORS:
        for shape, (width, height) in SIZES.items():
            picture = PIL.Image.new("RGBA", (60, 60))
            picture.paste(color, (5, 7, 5 + width, 7 + height))
            picture.save(folder / f"{color}_{shape}.png")
    PIL.Image.new("RGBA", (9, 9)).save(folder / "nothing.png")
    (folder / "broken.png").write_bytes(b"no picture")


def test_expressions_and_questions_fit_one_thing():
    def thing(name: str, *box: int) -> Thing:
        return Thing(Picture(name, name, (0, 0, 9, 9)), box)

    owl, small, large = thing("owl", 0, 10, 20, 50), thing("apple", 40, 0, 50, 10), thing("apple", 60, 10, 90, 40)
    bat = thing("bat", 33, 80, 53, 100)
    things, names = (owl, small, large, bat), ["apple", "bat", "cat", "owl"]
    drawn = {each for seed in range(20) for each in expressions(things, random.Random(seed))}
    assert drawn == {
        ("name", "the owl", owl),
        ("name", "the bat", bat),
        ("size", "the smaller apple", small),
        ("size", "the larger apple", large),
        ("place", "what is left of the bat", owl),
        ("place", "what is below the owl", bat),
    }
    asked = {
        (row["question"], row["answer"]) for seed in range(20) for row in questions(things, names, random.Random(seed))
    }
    assert asked == {
        ("is there an owl?", "yes"),
        ("is there a bat?", "yes"),
        ("is there a cat?", "no"),
        ("what is left of the bat?", "owl"),
        ("what is below the owl?", "bat"),
    }


def test_things_lie_apart(tmp_path):
    write_pictures(tmp_path)
    by_name = {picture.name: [picture] for picture in read_pictures(tmp_path)}
    assert by_name.keys() == {f"{color} {shape}" for color in COLORS for shape in SIZES}
    for seed in range(60):
        boxes = [thing.box for thing in place_things(by_name, 120, random.Random(seed))]
        for place, (x0, y0, x1, y1) in enumerate(boxes):
            assert 0 <= x0 < x1 <= 120 and 0 <= y0 < y1 <= 120
            assert all(x1 <= other[0] or other[2] <= x0 or y1 <= other[1] or other[3] <= y0 for other in boxes[:place])


def test_written_scenes_load_as_data_of_both_tasks(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    write_pictures(tmp_path / "pictures")
    held_out = {"red": "validation", "blue": "test"}
    monkeypatch.setattr(make_scenes, "split_of", lambda name: held_out.get(name.split()[0], "train"))
    sizes = ["--train_scenes=4", "--validation_scenes=3", "--test_scenes=3", "--side=64"]
    for out in ("drawn", "again"):
        make_scenes.main([f"--pictures={tmp_path / 'pictures'}", f"--output_dir={tmp_path / out}", *sizes])
    files = [path.relative_to(tmp_path / "drawn") for path in (tmp_path / "drawn").rglob("*") if path.is_file()]
    assert len(files) == 4 + 3 + 3 + 2 * 3
    assert all((tmp_path / "drawn" / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    for task, suffix, text in (("vqa", "", "question"), ("grounding", "_boxes", "expression")):
        paths = {
            f"{split}_file": str(tmp_path / f"drawn/{split}{suffix}.jsonl")
            for split in ("train", "validation", "test")
        }
        data = load_task_dataset(task, DataArguments(**paths))
        texts = {split: " ".join(rows[text]) for split, rows in data.items()}
        assert "red" not in texts["train"] + texts["test"] and "blue" not in texts["train"] + texts["validation"]
