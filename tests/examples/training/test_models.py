"""The model and the processor that a run starts with."""

import PIL.Image
import pytest
from transformers import BlipImageProcessor, CLIPImageProcessor, DeiTImageProcessor

from modeling_trips import TripsConfig, TripsForQuestionAnswering, TripsProcessor
from trips_examples.data.vocabulary import train_wordpiece_tokenizer
from trips_examples.training.models import ModelStart, make_processor
from trips_examples.training.options import ModelArguments


@pytest.fixture(scope="module")
def processor():
    return make_processor(train_wordpiece_tokenizer(["is it red?"]), TripsConfig.from_preset("tiny"))


@pytest.mark.parametrize("image_processor", [CLIPImageProcessor, DeiTImageProcessor, BlipImageProcessor])
def test_another_image_size_shows_the_whole_image(image_processor, processor, tmp_path):
    """Also where the checkpoint's processor would cut out the middle."""
    config = TripsConfig.from_preset("tiny", text_config={"vocab_size": len(processor.tokenizer)})
    TripsForQuestionAnswering(config).save_pretrained(tmp_path)
    TripsProcessor(image_processor(), processor.tokenizer).save_pretrained(tmp_path)
    args = ModelArguments(model_name_or_path=str(tmp_path), image_size=96)
    _, loaded = ModelStart(TripsForQuestionAnswering, args).finish([])
    image = PIL.Image.new("RGB", (300, 200), "black")
    image.paste("white", (0, 0, 150, 100))  # a quarter
    pixels = loaded(images=image, text="red", return_tensors="pt")["pixel_values"][0, 0]
    assert pixels.shape == (96, 96)
    assert (pixels > 0).float().mean() == pytest.approx(0.25, abs=0.02)


def processor_of(**vision_config):
    return make_processor(train_wordpiece_tokenizer(["a shape"]), TripsConfig(vision_config=vision_config))


def test_images_are_resized_to_the_size_of_the_model_square_or_not():
    wide, square = processor_of(image_size=[32, 64], patch_size=[8, 8]), processor_of(image_size=64, patch_size=8)
    image = PIL.Image.new("RGB", (40, 30))
    assert wide(images=image, text="a shape", return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 64)
    assert square(images=image, text="a shape", return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
    assert wide.patch_size == square.patch_size == 8


def test_patches_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="`patch_size`: processors cut square patches, not 8 x 16 pixels"):
        processor_of(image_size=64, patch_size=[8, 16])


def test_options_of_one_value_or_one_per_layer_reach_the_configuration():
    args = ModelArguments(selection_mode="mass", selection_mass=[0.9], min_keep_rate=[0.1, 0.2])
    fields = args.config_overrides()
    assert fields == {"selection_mode": "mass", "selection_mass": 0.9, "min_keep_rate": [0.1, 0.2]}
    options = TripsConfig.from_preset("tiny", **fields).vision_config.selection_options
    assert [layer["min_keep_rate"] for layer in options.values()] == [0.1, 0.2]
