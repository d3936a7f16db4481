"""The examples of `app.py`: the shipped checkpoint keeps what the examples ask about."""

import shutil

import PIL.Image
import pytest
import torch
from easy_vqa import get_test_image_paths

from modeling_trips import TripsForQuestionAnswering, TripsProcessor
from modeling_trips.inspection import share_inside, share_shown
from trips_examples.analysis.asking import Asker
from trips_examples.app import EXAMPLES, knows_easy_vqa
from trips_examples.ask import CHECKPOINT
from trips_examples.data.scenes import easy_vqa_records


@pytest.fixture(scope="module")
def regions() -> dict[str, torch.Tensor]:
    """The box of the shape that the questions are about, by the path of the picture."""
    return {str(row["image"]): torch.tensor(row["region"]).float() for row in easy_vqa_records("test")}


def kept_of(path: str, questions: list[str], **fields) -> list[torch.Tensor]:
    """Boxes of the patches that the last selection layer keeps for each question."""
    model = TripsForQuestionAnswering.from_pretrained(CHECKPOINT, **fields).eval()
    processor, image = TripsProcessor.from_pretrained(CHECKPOINT), PIL.Image.open(path)
    inputs = processor(images=image, text=questions, image_index=[0] * len(questions), return_tensors="pt")
    with torch.no_grad():
        selection = model.model(**inputs).selection
    return processor.patch_boxes(selection[-1].kept_indices, [(image.height, image.width)] * len(questions))


def followed(regions, **fields) -> int:
    """
    Of the ten examples, in how many the kept patches follow each question: they show four fifths of the shape that it
    is about, and lie on it twice as often as patches drawn at random.
    """
    count = 0
    for number, lines in EXAMPLES.items():
        path = str(get_test_image_paths()[number])
        region = regions[path]
        share_of_image = ((region[2] - region[0]) * (region[3] - region[1])).item() / 64**2
        kept = kept_of(path, lines.splitlines(), **fields)
        count += all(
            share_shown(boxes, region) >= 0.8 and share_inside(boxes, region) >= 2 * share_of_image for boxes in kept
        )
    return count


def test_kept_patches_follow_the_question_in_nine_of_ten_examples(regions):
    assert len(EXAMPLES) == 10
    assert followed(regions) >= 9
    assert followed(regions, selection_guidance="random") <= 1


def test_examples_go_by_what_the_checkpoint_was_trained_on(tmp_path):
    """Not by its name: a copy elsewhere has them, a model with another vocabulary has not."""
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    assert knows_easy_vqa(Asker(str(tmp_path / "model")))
    processor = TripsProcessor.from_pretrained(CHECKPOINT)
    processor.tokenizer.add_tokens(["frog"])
    processor.save_pretrained(tmp_path / "model")
    assert not knows_easy_vqa(Asker(str(tmp_path / "model")))
