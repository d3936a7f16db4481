"""Questions to checkpoints of each head: the answers are those of the pipelines, the drawings are small."""

import PIL.Image
import pytest
from easy_vqa import get_test_image_paths
from random_checkpoint import save_random_checkpoint

from modeling_trips import (
    UNPRUNED,
    TripsForConditionalGeneration,
    TripsForVisualGrounding,
    TripsImageToTextPipeline,
    TripsVisualQuestionAnsweringPipeline,
    use_schedule,
)
from trips_examples.analysis.asking import Asker, Look
from trips_examples.ask import CHECKPOINT


TEXTS = ["a red circle", "a", "the green triangle in the image"]


@pytest.fixture(scope="module")
def image() -> PIL.Image.Image:
    return PIL.Image.open(get_test_image_paths()[0]).convert("RGB")


def drawn_sides(look: Look) -> set[int]:
    return {max(picture.size) for result in look.results for _, picture in result.pictures}


def test_answers_are_those_of_the_pipeline(image):
    asker = Asker(str(CHECKPOINT))
    questions = ["what color is the shape?", "is there a circle?"]
    look = asker.ask(image, questions)
    found = TripsVisualQuestionAnsweringPipeline(model=asker.model, processor=asker.processor)(
        image, questions, top_k=3
    )
    assert [result.answers for result in look.results] == [
        [f"{each['answer']} ({each['score']:.1%})" for each in best] for best in found
    ]
    with use_schedule(asker.model, UNPRUNED):
        kept = TripsVisualQuestionAnsweringPipeline(model=asker.model, processor=asker.processor)(
            image, questions, top_k=1
        )
    assert [result.answers_at_keep_rate_1[0] for result in look.results] == [
        f"{best['answer']} ({best['score']:.1%})" for (best,) in kept
    ]


def test_captions_are_those_of_the_pipeline(image, tmp_path):
    asker = Asker(str(save_random_checkpoint(tmp_path, TripsForConditionalGeneration, TEXTS)))
    look = asker.ask(image, TEXTS)
    captioner = TripsImageToTextPipeline(model=asker.model, processor=asker.processor)
    assert [result.answers for result in look.results] == [
        [captioner(image, prompt=text)[0]["generated_text"]] for text in TEXTS
    ]


@pytest.mark.parametrize("size", [(4000, 3000), (64, 64), (60, 3000)])
def test_drawings_are_small_whatever_the_size_of_the_image(size, tmp_path):
    asker = Asker(str(save_random_checkpoint(tmp_path, TripsForVisualGrounding, TEXTS)))
    look = asker.ask(PIL.Image.new("RGB", size, "teal"), TEXTS[:1])
    assert max(drawn_sides(look)) <= 1024
    assert look.results[0].answers[0].startswith("box (")
