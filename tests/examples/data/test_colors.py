"""The main color of an image: plain colors, shares of several colors, and invisible pixels."""

import matplotlib.colors
import PIL.Image
import pytest

from trips_examples.data.colors import COLORS, main_color
from trips_examples.data.pictures import read_pictures


def strip(*parts: tuple[int, str | tuple[int, int, int, int]]) -> PIL.Image.Image:
    """Return an image of 10 x 10 pixels whose first pixels have the given numbers of colors."""
    colors = [PIL.Image.new("RGBA", (1, 1), color).getpixel((0, 0)) for number, color in parts for _ in range(number)]
    image = PIL.Image.new("RGBA", (10, 10))
    image.putdata(colors)
    return image


@pytest.mark.parametrize("color", COLORS)
def test_plain_pictures_have_the_color_that_people_call_so(color):
    """The typical colors of each name in the survey of xkcd.com."""
    typical = matplotlib.colors.to_hex(f"xkcd:{color}")
    assert main_color(PIL.Image.new("RGBA", (90, 50), typical)) == color


def test_light_and_dark_shades_have_the_color_of_their_hue():
    shades = {"lightblue": "blue", "navy": "blue", "darkgreen": "green", "gold": "yellow", "darkred": "brown"}
    assert {shade: main_color(strip((100, shade))) for shade in shades} == shades


def test_a_color_has_six_tenths_of_what_can_be_seen():
    assert main_color(strip((60, "red"), (40, "blue"))) == "red"
    assert main_color(strip((59, "red"), (41, "blue"))) == ""
    faint = (0, 0, 255, 127)
    assert main_color(strip((6, "red"), (4, "blue"), (90, faint))) == "red"
    assert main_color(strip((5, "red"), (5, "blue"), (90, faint))) == main_color(strip((100, faint))) == ""


def test_pictures_that_are_read_have_their_color(tmp_path):
    for name, parts in {"apple": [(30, "green")], "ball": [(30, "red"), (30, "blue")]}.items():
        strip(*parts).save(tmp_path / f"{name}.png")
    pictures = read_pictures([tmp_path], with_colors=True)
    assert {picture.name: picture.color for picture in pictures} == {"apple": "green", "ball": ""}
