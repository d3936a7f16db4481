"""`benchmarks/images/make_scenes.py`: composed scenes of named images, with questions and expressions."""

import itertools
import random

import make_scenes
from make_scenes import Picture, Thing, expressions, place_things, questions, read_pictures
from PIL import Image

from trips_examples.data.loading import DataArguments, load_task_dataset


COLORS = ("red", "blue", "green", "white", "black")
SIZES = {"bar": (40, 10), "card": (24, 30)}


def write_pictures(folder):
    """Write plain shapes with a transparent border, and files that cannot be used."""
    for color in COLORS:
        for shape, (width, height) in SIZES.items():
            picture = Image.new("RGBA", (60, 60))
            picture.paste(color, (5, 7, 5 + width, 7 + height))
            picture.save(folder / f"{color}_{shape}.png")
    Image.new("RGBA", (9, 9)).save(folder / "nothing.png")
    (folder / "broken.png").write_bytes(b"no picture")


def test_expressions_and_questions_fit_one_thing():
    def thing(name, *box):
        return Thing(Picture(name, name, (0, 0, 9, 9)), box)

    owl = thing("owl", 0, 10, 20, 50)
    small = thing("apple", 40, 0, 50, 10)
    large = thing("apple", 60, 10, 90, 40)
    bat = thing("bat", 33, 80, 53, 100)
    things = (owl, small, large, bat)
    drawn = set()
    asked = set()
    for seed in range(20):
        drawn.update(expressions(things, random.Random(seed)))
        for row in questions(things, ["apple", "bat", "cat", "owl"], random.Random(seed)):
            asked.add((row["kind"], row["question"], row["answer"]))
    assert drawn == {
        ("name", "the owl", owl),
        ("name", "the bat", bat),
        ("size", "the smaller apple", small),
        ("size", "the larger apple", large),
        ("place", "what is left of the bat", owl),
        ("place", "what is below the owl", bat),
    }
    assert asked == {
        ("presence", "is there an owl?", "yes"),
        ("presence", "is there a bat?", "yes"),
        ("presence", "is there a cat?", "no"),
        ("place", "what is left of the bat?", "owl"),
        ("place", "what is below the owl?", "bat"),
    }


def test_things_lie_apart(tmp_path):
    write_pictures(tmp_path)
    by_name = {picture.name: [picture] for picture in read_pictures(tmp_path)}
    assert by_name.keys() == {f"{color} {shape}" for color in COLORS for shape in SIZES}
    for seed in range(60):
        things = place_things(by_name, 120, random.Random(seed))
        for thing in things:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= 120
            assert 0 <= y0 < y1 <= 120
        for one, other in itertools.combinations(things, 2):
            beside = one.box[2] <= other.box[0] or other.box[2] <= one.box[0]
            above = one.box[3] <= other.box[1] or other.box[3] <= one.box[1]
            assert beside or above


def test_written_scenes_load_as_data_of_both_tasks(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    write_pictures(tmp_path / "pictures")
    monkeypatch.setattr(make_scenes, "hash_of", lambda name: 0.2 if name.startswith("red") else 0.5)
    sizes = ["--train_scenes=4", "--validation_scenes=3", "--test_scenes=3", "--side=64"]
    drawn = tmp_path / "drawn"
    again = tmp_path / "again"
    for folder in (drawn, again):
        make_scenes.main([f"--pictures={tmp_path / 'pictures'}", f"--output_dir={folder}", *sizes])
    files = [path.relative_to(drawn) for path in drawn.rglob("*") if path.is_file()]
    assert len(files) == 4 + 3 + 3 + 2 * 3
    for file in files:
        assert (drawn / file).read_bytes() == (again / file).read_bytes()
    for task, suffix, text in (("vqa", "", "question"), ("grounding", "_boxes", "expression")):
        arguments = DataArguments(
            train_file=str(drawn / f"train{suffix}.jsonl"),
            validation_file=str(drawn / f"validation{suffix}.jsonl"),
            test_file=str(drawn / f"test{suffix}.jsonl"),
        )
        data = load_task_dataset(task, arguments)
        texts = {split: " ".join(rows[text]) for split, rows in data.items()}
        assert "blue" in texts["train"] + texts["validation"] + texts["test"]
        assert "red" not in texts["train"] + texts["validation"] + texts["test"]
