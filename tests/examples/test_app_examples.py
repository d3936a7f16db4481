"""The examples of `app.py`: the shipped checkpoint keeps what the examples ask about."""

import shutil

import PIL.Image
import torch

from modeling_trips import TripsForQuestionAnswering, TripsProcessor
from modeling_trips.inspection import patch_precision
from trips_examples.analysis.asking import Asker
from trips_examples.app import EXAMPLES, knows_scenes
from trips_examples.ask import CHECKPOINT, QUESTIONS, SCENE
from trips_examples.data.scenes import TILE_SIZE, cell_origin


CELLS = {"gray": 0, "circle": 1, "yellow circle": 1, "blue": 2, "blue rectangle": 2, "red": 3, "triangle": 3}


def region_of(question: str) -> torch.Tensor | None:
    """The quarter of the scene that shows what a question names; None if nothing does."""
    words = question.rstrip("?").removesuffix(" shape").split()
    cell = CELLS.get(" ".join(words[-2:]), CELLS.get(words[-1]) if "there" not in words else None)
    if cell is None:
        return None
    x, y = cell_origin(cell, grid=2)
    return torch.tensor([x, y, x + TILE_SIZE, y + TILE_SIZE]).float()


def precision(questions: list[str], **fields) -> list[float]:
    """The share of the patches that the last selection layer keeps in the quarter that each question is about."""
    model = TripsForQuestionAnswering.from_pretrained(CHECKPOINT, **fields).eval()
    processor, image = TripsProcessor.from_pretrained(CHECKPOINT), PIL.Image.open(SCENE)
    inputs = processor(images=image, text=questions, image_index=[0] * len(questions), return_tensors="pt")
    with torch.no_grad():
        selection = model.model(**inputs).selection
    kept = processor.patch_boxes(selection[-1].kept_indices, [(image.height, image.width)] * len(questions))
    pairs = zip(kept, map(region_of, questions))
    return [float(patch_precision(boxes, region)) for boxes, region in pairs if region is not None]


def test_kept_patches_follow_each_question_about_the_scene():
    """All questions are about one image: at random, a quarter of the patches is in the quarter asked about."""
    questions = list(dict.fromkeys([*QUESTIONS, *"\n".join(EXAMPLES).splitlines()]))
    found = precision(questions)
    assert len(found) == 5
    assert min(found) >= 0.5
    assert max(precision(questions, selection_guidance="random")) < 0.5


def test_examples_go_by_what_the_checkpoint_was_trained_on(tmp_path):
    """Not by its name: a copy elsewhere has them, a model with another vocabulary has not."""
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    assert knows_scenes(Asker(str(tmp_path / "model")))
    processor = TripsProcessor.from_pretrained(CHECKPOINT)
    processor.tokenizer.add_tokens(["frog"])
    processor.save_pretrained(tmp_path / "model")
    assert not knows_scenes(Asker(str(tmp_path / "model")))
