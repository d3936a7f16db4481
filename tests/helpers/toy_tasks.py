"""A toy data set for each run_*.py script: plain images of 64 x 64 pixels, one row each."""

import os
import sys

from loading import read, write
from PIL import Image
from programs import output_of


COLORS = ["red", "blue", "green", "white", "black"]
SCRIPTS = {"vqa": "run_vqa", "captions": "run_captioning", "nlvr2": "run_nlvr2", "grounding": "run_grounding"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
OPTIONS = [
    "--preset=tiny",
    "--learning_rate=1e-3",
    "--lr_scheduler_type=constant",
    "--disable_tqdm=True",
    "--save_strategy=no",
]


def write_task(task, folder):
    """Write images and `rows.jsonl`, and return the options that use it for both splits."""
    for color in COLORS:
        Image.new("RGB", (64, 64), color).save(folder / f"{color}.png")
    file = write(folder / "rows.jsonl", list(_ROWS[task](folder)))
    return [f"--train_file={file}", f"--validation_file={file}"]


def _questions(folder):
    for color in COLORS:
        yield {"image": f"{color}.png", "question": "what color is it?", "answer": color}


def _captions(folder):
    for color in COLORS:
        yield {"image": f"{color}.png", "captions": [f"all is {color} here", f"a {color} image"]}


def _statements(folder):
    """Yield statements that are true of one pair and false of another; images occur in several pairs."""
    for number, color in enumerate(COLORS):
        other = COLORS[number - 1]
        yield {"images": [f"{color}.png"] * 2, "statement": f"both are {color}", "label": True}
        yield {"images": [f"{color}.png", f"{other}.png"], "statement": f"both are {color}", "label": False}


def _expressions(folder):
    """Yield expressions about images of 120 x 60 pixels with a square on the left or on the right."""
    for color in COLORS:
        for side, box in (("left", [10, 10, 50, 50]), ("right", [70, 20, 110, 60])):
            image = Image.new("RGB", (120, 60), "gray")
            image.paste(color, box)
            image.save(folder / f"{color}-{side}.png")
            yield {"image": f"{color}-{side}.png", "expression": f"the {color} square", "box": box}


_ROWS = {"vqa": _questions, "captions": _captions, "nlvr2": _statements, "grounding": _expressions}


def run(*words):
    """Run Python with these arguments and return the output."""
    return output_of(sys.executable, *words, env=ENVIRONMENT)


def predictions(folder):
    return read(folder / "predictions.jsonl")
