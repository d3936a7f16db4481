"""Every model raises an error that names the wrong input."""

from inspect import signature

import pytest
import torch
from tiny_models import CASES, each_model

from modeling_trips import TripsForRetrieval, TripsModel


each_with_image_cache = pytest.mark.parametrize(
    "case", [case for case in CASES if "image_cache" in signature(case.model_class.forward).parameters], ids=str
)


def encoder_of(model) -> TripsModel:
    return model if isinstance(model, TripsModel) else model.model


@each_model
def test_as_many_images_as_texts_are_needed(case):
    model, inputs = case.make_model(), case.make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].flatten(0, -4)[:3]
    if case.model_class is TripsForRetrieval:  # without losses it compares all images with all texts
        inputs["return_loss"] = True
    with pytest.raises(ValueError, match="image_index"):
        model(**inputs)
    with pytest.raises(ValueError, match="image_index"):
        model(**inputs, image_index=torch.tensor([0]))


@each_model
def test_an_image_size_must_be_a_multiple_of_the_patch_size(case):
    inputs = case.make_inputs()
    with pytest.raises(ValueError, match="pixel_values"):
        case.make_model()(**{**inputs, "pixel_values": inputs["pixel_values"][..., :15]})


@each_model
def test_a_text_must_fit_the_positions(case):
    inputs = case.make_inputs()
    inputs.pop("attention_mask")
    inputs["input_ids"] = torch.ones(4, 17, dtype=torch.long)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        case.make_model()(**inputs)


@each_model
def test_texts_come_as_tokens_or_embeddings(case):
    inputs = case.make_inputs()
    inputs["input_ids"] = None
    with pytest.raises(ValueError, match="input_ids"):
        case.make_model()(**inputs)


@each_with_image_cache
@torch.no_grad()
def test_images_come_as_pixels_or_as_a_cache(case):
    model, inputs = case.make_model(), case.make_inputs()
    pixel_values = inputs.pop("pixel_values")
    image_cache = encoder_of(model).encode_images(pixel_values.flatten(0, -4))
    both = {"pixel_values": pixel_values, "image_cache": image_cache}
    for images in ({}, both):
        with pytest.raises(ValueError, match="image_cache"):
            model(**inputs, **images)
