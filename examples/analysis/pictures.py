"""Drawings of the scores of patches."""

import PIL.Image
import PIL.ImageDraw
import torch

from modeling_trips.inspection.pictures import fit_for_drawing


def draw_scores(image: PIL.Image.Image, boxes: torch.Tensor, scores: torch.Tensor) -> PIL.Image.Image:
    """
    Draw scores as color on a gray image, relative to the highest score.

    Args:
        image (`PIL.Image.Image`): The original image. It is drawn with sides of 256 to 1024 pixels.
        boxes (`torch.Tensor` of shape `(num_candidates, 4)`): (x0, y0, x1, y1) in pixels of the image.
        scores (`torch.Tensor` of shape `(num_candidates,)`): Scores of at least 0. Their square roots are drawn.
    """
    image, scale = fit_for_drawing(image, min_side=256)
    grey = image.convert("L").convert("RGB")
    opacity = PIL.Image.new("L", grey.size)
    draw = PIL.ImageDraw.Draw(opacity)
    strength = (scores / scores.max().clamp_min(1e-12)).sqrt()
    for (x0, y0, x1, y1), share in zip((boxes.cpu() * scale).round().int().tolist(), strength.tolist()):
        if x0 < x1 and y0 < y1:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=round(230 * share))
    return PIL.Image.composite(PIL.Image.new("RGB", grey.size, "#d9480f"), grey, opacity)
