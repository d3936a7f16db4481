"""Boxes of patches, and boxes of visual grounding from pixels to labels and back, against the pixels themselves."""

import numpy as np
import pytest
import torch
import torchvision
from torch.testing import assert_close
from transformers import BertTokenizer, BlipImageProcessor, CLIPImageProcessor

from modeling_trips import TripsProcessor


SQUASH = BlipImageProcessor(size={"height": 64, "width": 64}, do_normalize=False)
# 64 x 32 (height x width), as for portrait images
UPRIGHT = BlipImageProcessor(size={"height": 64, "width": 32}, do_normalize=False)
RESIZE = CLIPImageProcessor(size={"shortest_edge": 64}, do_center_crop=False, do_normalize=False)
CROP = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, do_normalize=False)
PAD_TO_64 = CLIPImageProcessor(do_resize=False, crop_size=64, do_normalize=False)
PAD = CLIPImageProcessor(do_resize=False, crop_size={"height": 128, "width": 128}, do_normalize=False)

each_geometry = pytest.mark.parametrize(
    "image_processor", [SQUASH, UPRIGHT, RESIZE, CROP, PAD], ids=["squash", "upright", "resize", "crop", "pad"]
)
# (height, width) of images, each with a box in the middle square, which a crop keeps.
SIZES = [(60, 120), (100, 50), (33, 47), (64, 64)]
BOXES = [[40.25, 7.5, 80.0, 59.0], [3.0, 27.0, 46.5, 71.75], [10.0, 5.0, 30.0, 30.0], [0.0, 0.0, 64.0, 64.0]]


def make_processor(image_processor):
    return TripsProcessor(image_processor, BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1}))


@pytest.mark.parametrize("size", [(60, 120), (90, 50), (40, 20)], ids=str)
@pytest.mark.parametrize("image_processor", [SQUASH, CROP, PAD_TO_64], ids=["squash", "crop", "pad"])
def test_patches_agree_with_the_pixels(size, image_processor):
    """With all pixels outside a patch's box blackened, only that patch is bright."""
    processor = make_processor(image_processor)
    for index in (5, 6, 9):
        ((box,),) = processor.patch_boxes([[-1, index]], [size])  # without the fused token
        image = bright_in(size, box.round().int().tolist())
        pixel_values = processor(images=image, return_tensors="pt").pixel_values[0, 0]
        light = pixel_values.reshape(4, 16, 4, 16).sum(dim=(1, 3)).flatten()
        assert light[index] > 0.85 * light.sum() > 0


def bright_in(size, box):
    """Return an image of (height, width) that is white in the box (x0, y0, x1, y1) and black elsewhere."""
    x0, y0, x1, y1 = box
    image = np.zeros((*size, 3), dtype=np.uint8)
    image[y0:y1, x0:x1] = 255
    return image


def test_an_index_out_of_the_grid_is_refused():
    processor = make_processor(BlipImageProcessor(do_resize=False))
    # 70 x 33 (height x width): a grid of 4 rows, 2 columns; the remainder is no patch
    (boxes,) = processor.patch_boxes([[7]], [(70, 33)])
    assert boxes.tolist() == [[16, 48, 32, 64]]
    for index in (8, -3):
        with pytest.raises(ValueError, match=r"patch_indices\[1\]"):
            processor.patch_boxes([[0], [index]], [(70, 33)] * 2)


@pytest.mark.parametrize(
    "option, value",
    [
        ("size", {"longest_edge": 32}),
        ("size", {"shortest_edge": 32, "longest_edge": 64}),
        ("do_pad", True),
    ],
)
def test_resize_that_cannot_be_traced_back_is_refused(option, value):
    processor = make_processor(BlipImageProcessor(**{option: value}))
    with pytest.raises(ValueError, match=option):
        processor.patch_boxes([[0]], [(10, 10)])


def test_predictions_beyond_the_image_are_clipped():
    boxes = torch.tensor([[0.0, 1.0, 0.5, 1.0]])
    pixels = make_processor(SQUASH).post_process_grounding(boxes, [(80, 40)])
    assert pixels.tolist() == [[0, 40, 10, 80]]


@pytest.mark.parametrize(
    "image_processor, expected",
    [(SQUASH, [0.5, 0.5, 1.0, 1.0]), (PAD, [0.5, 0.5, 40 / 128, 80 / 128])],
    ids=["squash", "pad"],
)
def test_rounded_annotations_are_clipped(image_processor, expected):
    labels = make_processor(image_processor).encode_boxes([[-1, -0.5, 41, 80.01]], [(80, 40)])
    assert_close(labels, torch.tensor([expected]))


@each_geometry
def test_pixels_come_back(image_processor):
    processor = make_processor(image_processor)
    labels = processor.encode_boxes(BOXES, SIZES)
    assert labels.min() >= 0
    assert labels.max() <= 1
    pixels = processor.post_process_grounding(labels, SIZES)
    assert_close(pixels, torch.tensor(BOXES), rtol=0, atol=1e-4)


@each_geometry
def test_labels_agree_with_the_pixels(image_processor):
    """The bright pixels of `pixel_values` of an image that is only bright in the box agree with the label."""
    processor = make_processor(image_processor)
    for size, box in zip(SIZES, BOXES):
        box = [round(number) for number in box]
        pixel_values = processor(images=bright_in(size, box), return_tensors="pt").pixel_values
        light = pixel_values[0, 0]
        is_bright = light > 0.5 * light.max()
        rows, columns = is_bright.nonzero().unbind(dim=1)
        found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        label = processor.encode_boxes([box], [size])
        height, width = light.shape
        expected = torchvision.ops.box_convert(label, "cxcywh", "xyxy")[0] * torch.tensor([width, height] * 2)
        assert_close(found.float(), expected, rtol=0, atol=1)


@pytest.mark.parametrize(
    "image_processor, box",
    [
        (SQUASH, [10, 10, 10, 20]),  # no area
        (SQUASH, [10, 10, 20, 82]),
        (SQUASH, [-2, 10, 20, 30]),
        (SQUASH, [40, 10, 41, 20]),
        (SQUASH, [10, 10, float("nan"), 20]),
        (CROP, [0, 0, 40, 18]),  # above the crop
    ],
)
def test_a_bad_box_is_named_by_its_row(image_processor, box):
    good = [0, 0, 40, 80]
    with pytest.raises(ValueError, match=r"boxes\[1\]"):
        make_processor(image_processor).encode_boxes([good, box, box], [(80, 40)] * 3)


def test_boxes_need_one_size_each_and_four_numbers():
    processor = make_processor(SQUASH)
    for boxes in ([[0, 0, 1, 1]], [[0, 0, 1]] * 2, [0, 0, 1, 1]):
        with pytest.raises(ValueError, match="boxes"):
            processor.encode_boxes(boxes, [(8, 8)] * 2)
        with pytest.raises(ValueError, match="target_sizes"):
            processor.post_process_grounding(torch.tensor(boxes), [(8, 8)] * 2)
