"""`benchmarks/images/make_cards.py`: named images side by side, with questions that need no region."""

import json
import random

import make_cards
import numpy as np
import PIL.Image
from make_cards import COLORS, draw_card, questions
from make_scenes import read_pictures


def write_pictures(folder):
    """Write six plain images, each of one color and named by it."""
    for color in ("black", "white", "orange", "purple", "brown", "pink"):
        picture = PIL.Image.new("RGBA", (40, 40))
        picture.paste(color, (5, 5, 35, 25))
        picture.save(folder / f"{color}.png")


def test_questions_follow_the_order_of_the_things():
    names = ["ant", "bat", "cat", "owl"]
    rows = list(questions(["owl", "cat", "bat"], "red", names, random.Random(0)))
    assert len(rows) == 6
    answers = {row["question"]: row["answer"] for row in rows}
    assert answers["what is on the left?"] == "owl"
    assert answers["what is on the right?"] == "bat"
    assert answers["how many things are there?"] == "three"
    assert answers["is there an ant?"] == "no"
    assert answers["what color is the card?"] == "red"
    assert {row["answer"] for row in rows if row["kind"] == "presence"} == {"no", "yes"}
    one = [row["question"] for row in questions(["owl"], "red", names, random.Random(0))]
    assert "what is on the left?" not in one


def test_things_stand_from_left_to_right(tmp_path):
    write_pictures(tmp_path)
    pictures = {picture.name: picture for picture in read_pictures(tmp_path)}
    shown = [pictures["black"], pictures["orange"], pictures["white"]]
    for seed in range(20):
        card = draw_card(shown, "blue", 112, random.Random(seed))
        assert card.size == (112, 112)
        pixels = np.asarray(card)
        _, black = (pixels == (0, 0, 0)).all(axis=-1).nonzero()
        _, orange = (pixels == (255, 165, 0)).all(axis=-1).nonzero()
        _, white = (pixels == (255, 255, 255)).all(axis=-1).nonzero()
        assert black.max() < orange.min()
        assert orange.max() < white.min()


def test_files(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    write_pictures(pictures)
    folder = tmp_path / "cards"
    sizes = ["--train_cards=5", "--validation_cards=2", "--test_cards=3"]
    make_cards.main([f"--pictures={pictures}", f"--output_dir={folder}", *sizes])
    for split, number in (("train", 5), ("validation", 2), ("test", 3)):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        assert len({row["image"] for row in rows}) == number
        assert all((folder / row["image"]).is_file() for row in rows)
        assert {row["kind"] for row in rows} <= {"side", "count", "presence", "color"}
        assert {row["answer"] for row in rows if row["kind"] == "color"} <= COLORS.keys()
