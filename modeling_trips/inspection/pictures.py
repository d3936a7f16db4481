"""Figures of kept patches."""

import math
import textwrap
from os import PathLike

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from ..image_decoding_trips import convert_to_rgb
from .files import whole_file


MAX_SIDE = 1024  # longer side of every figure in pixels
OUTLINE = "#d9480f"  # of the kept area


def draw_kept_patches(image: Image.Image, boxes: torch.Tensor, min_side: int = 256) -> Image.Image:
    """
    Draw the image with dropped patches faded to white and kept patches outlined.

    Args:
        image (`PIL.Image.Image`): The original image, of any mode and size (see [`convert_to_rgb`]).
        boxes (`torch.Tensor` of shape `(num_kept, 4)`): Boxes (x0, y0, x1, y1) of the kept patches in pixels of the
            image, see [`TripsProcessor.patch_boxes`].
        min_side (`int`, *optional*, defaults to 256): Shorter side to which smaller images are enlarged by a whole
            factor.

    Returns:
        `PIL.Image.Image`: A new image of mode "RGB" whose longer side has at most 1024 pixels.

    Raises:
        ValueError: `boxes` have another shape.
    """
    boxes = torch.as_tensor(boxes, device="cpu")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"`boxes` must have the shape (num_kept, 4), got {tuple(boxes.shape)}.")
    image, scale = _fit_for_drawing(image, min_side)
    kept = Image.new("L", image.size)
    draw = ImageDraw.Draw(kept)
    boxes = (boxes * scale).round().int()
    for x0, y0, x1, y1 in boxes.tolist():
        if x0 < x1 and y0 < y1:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=255)
    faded = Image.blend(image, Image.new("RGB", image.size, "white"), 0.75)
    picture = Image.composite(image, faded, kept)
    inner = kept
    for _ in range(max(1, min(image.size) // 160)):  # the width of the outline
        inner = inner.filter(ImageFilter.MinFilter(3))
    picture.paste(OUTLINE, mask=ImageChops.subtract(kept, inner))
    return picture


def _fit_for_drawing(image: Image.Image, min_side: int = 1) -> tuple[Image.Image, torch.Tensor]:
    """
    Reduce an image to a longer side of `MAX_SIDE`, or enlarge it by a whole factor to a shorter side of `min_side`,
    but never beyond `MAX_SIDE`. Return it in mode "RGB", and a tensor of shape `(4,)` that scales its boxes.
    """
    image = convert_to_rgb(image)
    width, height = image.size
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    wanted = math.ceil(min_side / min(image.size))
    largest = MAX_SIDE // max(image.size)
    factor = max(1, min(wanted, largest))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale_x = image.width / width
    scale_y = image.height / height
    return image, torch.tensor([scale_x, scale_y, scale_x, scale_y])


def plot_selection(
    image: Image.Image,
    questions: list[str],
    answers: list[str],
    boxes_per_question: list[torch.Tensor] | list[list[torch.Tensor]],
    num_patches: int | None = None,
    path: str | PathLike | None = None,
):
    """
    Plot the image and the patches kept for each question: a column per question, a row per selection layer. Needs
    matplotlib.

    Args:
        image (`PIL.Image.Image`): The original image, of any mode and size.
        questions, answers (`list[str]`): The questions, and the model's answer to each.
        boxes_per_question (`list[torch.Tensor]` or `list[list[torch.Tensor]]`): For each question its kept boxes, of
            shape `(num_kept, 4)` (see [`draw_kept_patches`]), or a list of such tensors, one per selection layer.
        num_patches (`int`, *optional*): Patches of the whole grid, for captions such as "137 of 576 patches".
        path (`str` or `os.PathLike`, *optional*): File to write the figure to, whole or not at all. The suffix sets
            the format (.png, .pdf, .svg).

    Returns:
        `matplotlib.figure.Figure`: The figure, which is not registered with pyplot and needs no closing.

    Raises:
        ValueError: There is no question, or questions, answers, boxes or their numbers of layers differ in number.
    """
    layers = [boxes if isinstance(boxes, (list, tuple)) else [boxes] for boxes in boxes_per_question]
    if not len(questions) == len(answers) == len(layers) > 0:
        raise ValueError(
            "`questions`, `answers` and `boxes_per_question` must have the same length of at least 1, got "
            f"{len(questions)}, {len(answers)} and {len(layers)}."
        )
    from matplotlib.figure import Figure  # an extra

    image, scale = _fit_for_drawing(image)
    num_rows = len(layers[0])
    num_columns = 1 + len(questions)
    width = 3.0  # of a panel, in inches
    height = width * image.height / image.width + 0.7  # with its title
    figure = Figure(figsize=(width * num_columns, height * num_rows), dpi=150, layout="compressed")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for panel in axes.flat:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    axes[0, 0].imshow(image)
    axes[0, 0].set_title("original", fontsize=10)
    for panel, question, answer in zip(axes[0, 1:], questions, answers):
        panel.set_title(f"{textwrap.fill(question, 32)}\n→ {answer}", fontsize=10)
    total = f" of {num_patches}" if num_patches else ""
    for row, boxes_per_column in enumerate(zip(*layers, strict=True)):
        for panel, boxes in zip(axes[row, 1:], boxes_per_column):
            panel.imshow(draw_kept_patches(image, boxes.cpu() * scale))
            layer = f"selection {row + 1}: " if len(axes) > 1 else ""
            panel.set_xlabel(f"{layer}{len(boxes)}{total} patches", fontsize=9)
    if path is not None:
        with whole_file(path) as partial:
            figure.savefig(partial)
    return figure
