"""Boxes of patches in the original images, for all resizes and crops."""

import numpy as np
import pytest
import torch
from tiny_processors import make_processor
from transformers import BlipImageProcessor, CLIPImageProcessor


@pytest.fixture
def processor():
    return make_processor()


def test_boxes_of_a_squashed_image():
    # 4 x 4 patches of 16 pixels in 64 x 64; the image of 64 x 32 (width x height) has patches of 16 x 8
    processor = make_processor(BlipImageProcessor(size={"height": 64, "width": 64}))
    first, second = processor.patch_boxes(torch.tensor([[0, 5, 11, -1], [15, -1, 3, 4]]), [(32, 64), (32, 64)])
    assert first.dtype == torch.float32
    assert first.tolist() == [[0, 0, 16, 8], [16, 8, 32, 16], [48, 16, 64, 24]]
    assert second.tolist() == [[48, 24, 64, 32], [48, 0, 64, 8], [0, 8, 16, 16]]


def test_boxes_without_a_resize():
    processor = make_processor(BlipImageProcessor(do_resize=False))
    # 70 x 33 (height x width): a grid of 4 rows, 2 columns; the remainder is no patch
    assert processor.patch_boxes([[7]], [(70, 33)])[0].tolist() == [[16, 48, 32, 64]]
    with pytest.raises(ValueError, match="got 8"):
        processor.patch_boxes([[8]], [(70, 33)])


def test_boxes_of_a_center_crop():
    # 120 x 60 (width x height) -> 64 x 32 -> the middle 32 x 32, from x = 16: one pixel is 1.875 of the original,
    # so the left patch starts at 30 and the right one ends at 90
    clip = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    (boxes,) = make_processor(clip).patch_boxes([[0, 1, 2]], [(60, 120)])
    assert boxes.tolist() == [[30, 0, 60, 30], [60, 0, 90, 30], [30, 30, 60, 60]]


@pytest.mark.parametrize("size", [(60, 120), (90, 50), (33, 47), (40, 20)], ids=str)
@pytest.mark.parametrize("kind", ["squash", "crop", "pad"])
def test_boxes_agree_with_the_pixels(size, kind):
    """With all pixels outside a patch's box blackened, only that patch is bright."""
    if kind == "squash":
        image_processor = BlipImageProcessor(size={"height": 64, "width": 64}, do_normalize=False)
    elif kind == "crop":
        image_processor = CLIPImageProcessor(size=64, crop_size=64, do_normalize=False)
    else:
        image_processor = CLIPImageProcessor(do_resize=False, crop_size=64, do_normalize=False)
    processor = make_processor(image_processor)
    for index in (5, 6, 9):
        x0, y0, x1, y1 = processor.patch_boxes([[index]], [size])[0][0].round().int().tolist()
        image = np.zeros((*size, 3), dtype=np.uint8)
        image[y0:y1, x0:x1] = 255
        pixel_values = processor(images=image, return_tensors="pt").pixel_values[0, 0]
        light = pixel_values.reshape(4, 16, 4, 16).sum(dim=(1, 3)).flatten()
        assert light[index] > 0.85 * light.sum() > 0


@pytest.mark.parametrize("index", [4, -3])
def test_index_out_of_the_grid_is_named(processor, index):
    with pytest.raises(ValueError, match=r"patch_indices\[1\]"):
        processor.patch_boxes([[0], [index]], [(10, 10), (10, 10)])


@pytest.mark.parametrize(
    "options",
    [{"size": {"longest_edge": 32}}, {"size": {"shortest_edge": 32, "longest_edge": 64}}, {"do_pad": True}],
    ids=str,
)
def test_resize_that_cannot_be_traced_back_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_processor(BlipImageProcessor(**options)).patch_boxes([[0]], [(10, 10)])


def test_boxes_need_one_size_per_row(processor):
    with pytest.raises(ValueError, match="patch_indices"):
        processor.patch_boxes([[0], [0]], [(10, 10)])
