"""Boxes of visual grounding in the processor: pixels to labels, and predictions to pixels."""

import numpy as np
import pytest
import torch
import torchvision
from transformers import BertTokenizer, BlipImageProcessor, CLIPImageProcessor

from modeling_trips import TripsProcessor


SQUASH = BlipImageProcessor(size={"height": 64, "width": 64}, do_normalize=False)
# 64 x 32 (height x width), as for portrait images
UPRIGHT = BlipImageProcessor(size={"height": 64, "width": 32}, do_normalize=False)
RESIZE = CLIPImageProcessor(size={"shortest_edge": 64}, do_center_crop=False, do_normalize=False)
CROP = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, do_normalize=False)
PAD = CLIPImageProcessor(do_resize=False, crop_size={"height": 128, "width": 128}, do_normalize=False)

each_geometry = pytest.mark.parametrize(
    "image_processor", [SQUASH, UPRIGHT, RESIZE, CROP, PAD], ids=["squash", "upright", "resize", "crop", "pad"]
)
# (height, width) of images, each with a box in the middle square, which a crop keeps.
SIZES = [(60, 120), (100, 50), (33, 47), (64, 64)]
BOXES = [[40.25, 7.5, 80.0, 59.0], [3.0, 27.0, 46.5, 71.75], [10.0, 5.0, 30.0, 30.0], [0.0, 0.0, 64.0, 64.0]]


def make_processor(image_processor):
    return TripsProcessor(image_processor, BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1}))


# ---------------------------------------------------------------------------------------------------------------------
# By hand


def test_boxes_of_a_squashed_image():
    processor, sizes = make_processor(SQUASH), [(50, 200), (100, 100)]
    boxes = [[50, 10, 150, 20], [0, 0, 100, 100]]
    labels = processor.encode_boxes(boxes, sizes)
    assert labels.dtype == torch.float32
    torch.testing.assert_close(labels, torch.tensor([[0.5, 0.3, 0.5, 0.2], [0.5, 0.5, 1.0, 1.0]]))
    pixels = processor.post_process_grounding(labels, sizes)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, torch.tensor(boxes, dtype=torch.float32))


def test_boxes_of_a_crop_larger_than_the_image():
    # 64 x 32 (width x height) in the middle of 128 x 128: it starts at x = 32, y = 48
    processor, sizes = make_processor(PAD), [(32, 64)]
    labels = processor.encode_boxes([[0, 0, 64, 32]], sizes)
    torch.testing.assert_close(labels, torch.tensor([[0.5, 0.5, 0.5, 0.25]]))
    # Predictions: one around the image, one in the padding.
    pixels = processor.post_process_grounding(torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.1, 0.5, 0.1, 0.1]]), sizes * 2)
    assert pixels[0].tolist() == [0, 0, 64, 32]
    assert pixels[1, 0] == pixels[1, 2] == 0


def test_predictions_beyond_the_image_are_clipped():
    boxes = torch.tensor([[0.0, 1.0, 0.5, 1.0]])
    assert make_processor(SQUASH).post_process_grounding(boxes, [(80, 40)]).tolist() == [[0, 40, 10, 80]]


def test_rounded_annotations_are_clipped():
    for image_processor, expected in ((SQUASH, [0.5, 0.5, 1.0, 1.0]), (PAD, [0.5, 0.5, 40 / 128, 80 / 128])):
        labels = make_processor(image_processor).encode_boxes([[-1, -0.5, 41, 80.01]], [(80, 40)])
        torch.testing.assert_close(labels, torch.tensor([expected]))


# ---------------------------------------------------------------------------------------------------------------------
# In general


@each_geometry
def test_pixels_come_back(image_processor):
    processor = make_processor(image_processor)
    labels = processor.encode_boxes(BOXES, SIZES)
    assert (labels >= 0).all() and (labels <= 1).all()
    pixels = processor.post_process_grounding(labels, SIZES)
    torch.testing.assert_close(pixels, torch.tensor(BOXES), rtol=0, atol=1e-4)


@each_geometry
def test_labels_agree_with_the_pixels(image_processor):
    """The bright pixels of `pixel_values` of an image that is only bright in the box agree with the label."""
    processor = make_processor(image_processor)
    for (height, width), box in zip(SIZES, BOXES):
        x0, y0, x1, y1 = box = [round(number) for number in box]
        image = np.zeros((height, width, 3), dtype=np.uint8)
        image[y0:y1, x0:x1] = 255
        light = processor(images=image, return_tensors="pt").pixel_values[0, 0]
        label = processor.encode_boxes([box], [(height, width)])
        corners = torchvision.ops.box_convert(label, "cxcywh", "xyxy")[0]
        columns, rows = (light.amax(axis) > 0.5 * light.max() for axis in (0, 1))
        for lit, start, end in ((columns, corners[0], corners[2]), (rows, corners[1], corners[3])):
            positions = lit.nonzero()[:, 0]
            assert positions[0].item() == pytest.approx(start.item() * len(lit), abs=1)
            assert positions[-1].item() + 1 == pytest.approx(end.item() * len(lit), abs=1)


# ---------------------------------------------------------------------------------------------------------------------
# Bad boxes
