"""The main color of an image, as one of the eleven basic color terms of English (Berlin and Kay, 1969)."""

import numpy as np
import PIL.Image


SHARE = 0.6  # smallest share of the visible pixels for the main color
SIDE = 32  # pixels, size of the image that is examined
DARK, LIGHT = 0.25, 0.85  # HSV values: black below the first, white above the second without a hue
UNSATURATED = 0.2  # saturation below which a pixel has no hue
BROWN = 0.65  # HSV value below which red and orange are brown
HUES = {
    "red": 15,
    "orange": 42,
    "yellow": 68,
    "green": 165,
    "blue": 255,
    "purple": 290,
    "pink": 345,
}  # up to, degrees
COLORS = (*HUES, "brown", "black", "gray", "white")
COLOR_WORDS = {*COLORS, "grey"}


def main_color(image: PIL.Image.Image) -> str:
    """
    Return the color of at least `SHARE` of the visible pixels, one of `COLORS`, or `""` if no color has that share.

    Args:
        image (`PIL.Image.Image`): RGBA, of any size. Pixels less than half opaque do not count.
    """
    image = image.copy()
    image.thumbnail((SIDE, SIDE), PIL.Image.Resampling.BOX)
    visible = np.asarray(image.getchannel("A")) > 127
    hue, saturation, value = np.asarray(image.convert("RGB").convert("HSV"))[visible].T / 255
    hues = np.array([*HUES, "red"])[np.searchsorted(list(HUES.values()), 360 * hue, side="right")]
    names = np.select(
        [
            value < DARK,
            (saturation < UNSATURATED) & (value > LIGHT),
            saturation < UNSATURATED,
            np.isin(hues, ["red", "orange"]) & (value < BROWN),
        ],
        ["black", "white", "gray", "brown"],
        hues,
    )
    colors, counts = np.unique(names, return_counts=True)
    return str(colors[counts.argmax()]) if counts.sum() and counts.max() >= SHARE * counts.sum() else ""
