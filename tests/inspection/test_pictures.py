"""Drawings of kept patches: exact pixels, and texts of the figure."""

import pytest
import torch
from PIL import Image

from modeling_trips.inspection.pictures import draw_kept_patches, plot_selection


COLOR = (100, 40, 200)
FADED = (216, 201, 241)  # 0.25 * color + 0.75 * 255, rounded down: 216.25, 201.25, 241.25
OUTLINE = (217, 72, 15)
# The left column and the lower middle of a grid of 3 x 2 patches of 10 x 10 pixels
BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 10, 10, 20], [10, 10, 20, 20]])


@pytest.fixture
def image():
    return Image.new("RGB", (30, 20), COLOR)


def test_dropped_pixels_fade_and_the_outline_runs_inside_the_kept_area(image):
    picture = draw_kept_patches(image, BOXES, min_side=1)
    assert picture.mode == "RGB"
    assert picture.size == (30, 20)
    assert image.getpixel((9, 5)) == COLOR  # the given image stays as it is
    for x in range(30):
        for y in range(20):
            is_kept = x < 10 or (x < 20 and y >= 10)
            is_edge = (x == 9 and y <= 9) or (9 <= x < 20 and y == 10) or (x == 19 and y >= 10)
            expected = FADED
            if is_edge:
                expected = OUTLINE
            elif is_kept:
                expected = COLOR
            assert picture.getpixel((x, y)) == expected, (x, y)


def test_small_images_are_enlarged(image):
    picture = draw_kept_patches(image, torch.tensor([[20.0, 10, 30, 20]]), min_side=50)
    assert picture.size == (90, 60)  # 3 is the smallest whole factor that makes 20 at least 50
    assert picture.getpixel((89, 59)) == COLOR
    assert picture.getpixel((60, 59)) == OUTLINE
    assert picture.getpixel((59, 59)) == FADED
    assert draw_kept_patches(Image.new("RGB", (60, 3000)), BOXES).size == (20, 1024)  # the bound goes first


def test_figure_has_a_panel_per_question(image, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "selection.png"
    figure = plot_selection(image, ["what is red ?", "where ?"], ["a cat", "left"], [BOXES, BOXES[:1]], 6, path)
    assert [(panel.get_title(), panel.get_xlabel()) for panel in figure.axes] == [
        ("original", ""),
        ("what is red ?\n→ a cat", "3 of 6 patches"),
        ("where ?\n→ left", "1 of 6 patches"),
    ]
    (shown,) = figure.axes[2].images
    pixels = shown.get_array()
    assert tuple(pixels[60, 60]) == COLOR
    assert tuple(pixels[200, 60]) == FADED
    with Image.open(path) as picture:
        assert picture.format == "PNG"
    with pytest.raises(ValueError):  # another number of layers
        plot_selection(image, ["what ?", "where ?"], ["a cat", "left"], [[BOXES, BOXES], [BOXES]])
