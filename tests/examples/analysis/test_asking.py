"""Questions to checkpoints of each head: the answers are those of the pipelines, the drawings are small."""

import shutil

import PIL.Image
import pytest
from easy_vqa import get_test_image_paths
from random_checkpoint import save_random_checkpoint

from modeling_trips import (
    TripsConfig,
    TripsForConditionalGeneration,
    TripsForRetrieval,
    TripsForVisualGrounding,
    TripsImageToTextPipeline,
    TripsProcessor,
    TripsVisualQuestionAnsweringPipeline,
)
from trips_examples.analysis.asking import Asker
from trips_examples.app import knows_scenes
from trips_examples.ask import CHECKPOINT


TEXTS = ["a red circle", "a", "the green triangle in the image"]


@pytest.fixture(scope="module")
def image() -> PIL.Image.Image:
    return PIL.Image.open(get_test_image_paths()[0]).convert("RGB")


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
    asker.model.config.vision_config.keep_rate = 1.0
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


@pytest.mark.parametrize("size", [(4000, 3000), (60, 3000)])
def test_drawings_are_small_whatever_the_size_of_the_image(size, tmp_path):
    asker = Asker(str(save_random_checkpoint(tmp_path, TripsForVisualGrounding, TEXTS)))
    look = asker.ask(PIL.Image.new("RGB", size, "teal"), TEXTS[:1])
    (result,) = look.results
    assert max(max(picture.size) for _, picture in result.pictures) <= 1024
    assert result.answers[0].startswith("box (")


def test_exported_models_and_checkpoints_for_other_tasks_are_refused(tmp_path):
    TripsForRetrieval(TripsConfig.from_preset("tiny")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="TripsForRetrieval"):
        Asker(str(tmp_path))
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(ValueError, match="exported"):
        Asker(str(tmp_path))


def test_examples_of_the_app_depend_on_the_vocabulary_of_the_checkpoint(tmp_path):
    """A copy of the shipped checkpoint has examples, a model with another vocabulary does not."""
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    assert knows_scenes(Asker(str(tmp_path / "model")))
    processor = TripsProcessor.from_pretrained(CHECKPOINT)
    processor.tokenizer.add_tokens(["frog"])
    processor.save_pretrained(tmp_path / "model")
    assert not knows_scenes(Asker(str(tmp_path / "model")))
