"""Drawings of kept patches: exact pixels, and texts of the figure."""

import pytest
import torch
from PIL import Image

from modeling_trips.inspection.pictures import draw_kept_patches, plot_selection


COLOR = (100, 40, 200)
FADED = (216, 201, 241)  # 0.25 * color + 0.75 * 255, rounded down: 216.25, 201.25, 241.25
OUTLINE = (255, 0, 0)
# The left column and the lower middle of a grid of 3 x 2 patches of 10 x 10 pixels
BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 10, 10, 20], [10, 10, 20, 20]])


@pytest.fixture
def image():
    return Image.new("RGB", (30, 20), COLOR)


def colors(picture):
    return {color for _, color in picture.getcolors()}


def test_dropped_pixels_fade(image):
    picture = draw_kept_patches(image, BOXES, outline=None, min_side=1)
    assert (picture.mode, picture.size) == ("RGB", (30, 20))
    for x in range(30):
        for y in range(20):
            kept = x < 10 or (x < 20 and y >= 10)
            assert picture.getpixel((x, y)) == (COLOR if kept else FADED), (x, y)
    assert image.getpixel((29, 0)) == COLOR


def test_outline_runs_inside_the_kept_area_and_not_between_kept_patches(image):
    picture = draw_kept_patches(image, BOXES, outline="red", min_side=1)
    for outside, edge, inside in (
        ((10, 5), (9, 5), (8, 5)),
        ((15, 9), (15, 10), (15, 11)),
        ((20, 15), (19, 15), (18, 15)),
    ):
        assert [picture.getpixel(at) for at in (outside, edge, inside)] == [FADED, OUTLINE, COLOR]
    # between neighbors, and along the border of the image
    assert {picture.getpixel(at) for at in ((5, 9), (5, 10), (9, 15), (10, 15), (0, 5), (5, 0), (15, 19))} == {COLOR}


def test_small_images_are_enlarged(image):
    image.putpixel((29, 19), (1, 2, 3))
    picture = draw_kept_patches(image, torch.tensor([[20.0, 10, 30, 20]]), outline=None, min_side=50)
    assert picture.size == (90, 60)  # 3 is the smallest whole factor that makes 20 at least 50
    assert {picture.getpixel((x, y)) for x in (87, 89) for y in (57, 59)} == {(1, 2, 3)}
    assert picture.getpixel((86, 59)) == COLOR and picture.getpixel((59, 59)) == FADED
    assert draw_kept_patches(Image.new("RGB", (60, 3000)), BOXES).size == (20, 1024)  # the bound goes first


def labels(figure):
    return [(panel.get_title(), panel.get_xlabel()) for panel in figure.axes]


def test_figure_has_a_panel_per_question(image, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "selection.png"
    figure = plot_selection(image, ["what is red ?", "where ?"], ["a cat", "left"], [BOXES, BOXES[:1]], 6, path)
    assert labels(figure) == [
        ("original", ""),
        ("what is red ?\n→ a cat", "3 of 6 patches"),
        ("where ?\n→ left", "1 of 6 patches"),
    ]
    assert [len(panel.images) for panel in figure.axes] == [1, 1, 1]
    shown = figure.axes[2].images[0].get_array()
    assert tuple(shown[60, 60]) == COLOR and tuple(shown[200, 60]) == FADED
    assert [file.name for file in tmp_path.iterdir()] == ["selection.png"]
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > picture.height
