"""Drawing of boxes in images."""

from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw
import PIL.ImageOps


TRUE_COLOR, PREDICTED_COLOR = "#2b8a3e", "#1864ab"  # kept patches have orange outlines
SIDE = 240  # pixels


def draw_boxes(image: PIL.Image.Image, true_box: Sequence[float], predicted_box: Sequence[float]) -> PIL.Image.Image:
    """Draw the true box in green and the predicted box in blue. The image's longer side becomes `SIDE` pixels."""
    picture = PIL.ImageOps.contain(image, (SIDE, SIDE))
    draw = PIL.ImageDraw.Draw(picture)
    for box, color in ((true_box, TRUE_COLOR), (predicted_box, PREDICTED_COLOR)):
        draw.rectangle([number * SIDE / max(image.size) for number in box], outline=color, width=3)
    return picture


def sheet(pictures: list[PIL.Image.Image], titles: list[str]) -> PIL.Image.Image:
    """Arrange images of at most `SIDE` pixels in rows of four, with a title below each."""
    columns, cell_width, cell_height = 4, SIDE + 10, SIDE + 30
    rows = -(-len(pictures) // columns)
    whole = PIL.Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = PIL.ImageDraw.Draw(whole)
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        x, y = number % columns * cell_width + 5, number // columns * cell_height + 5
        whole.paste(picture, (x, y))
        draw.text((x, y + SIDE + 4), title, fill="black", font_size=13)
    return whole
