"""Processors of models from scratch fit the models."""

import PIL.Image
import pytest

from modeling_trips import TripsConfig
from trips_examples.data.vocabulary import train_wordpiece_tokenizer
from trips_examples.training.models import make_processor


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
