"""Drawings of kept patches and scores, and groups of rows by their target region."""

from collections import defaultdict

import PIL.Image
import PIL.ImageDraw
import torch
from datasets import Dataset

from modeling_trips import TripsModel
from modeling_trips.inspection import draw_kept_patches
from modeling_trips.inspection.pictures import fit_for_drawing
from trips_examples.analysis.comparison import TEXT_COLUMNS, groups_of_region, key_of
from trips_examples.data.collators import ImageBatchCollator
from trips_examples.data.rows import image_sizes
from trips_examples.data.task_collators import a_text_per_image
from trips_examples.metrics.selection import REGION_COLUMNS, regions_of


def features_of(dataset: Dataset) -> dict[tuple[str, str], dict[str, str]]:
    """Return groups of rows by key: size and place of the target region, and number of target regions per image."""
    wanted = ("source", "image_id", *TEXT_COLUMNS, *REGION_COLUMNS)
    rows = list(dataset.select_columns([column for column in wanted if column in dataset.column_names]))
    regions = regions_of(rows)
    sizes = image_sizes(dataset) if regions else {}
    things = defaultdict(set)
    for number, region in regions.items():
        things[rows[number]["image_id"]].add(tuple(region))
    features = {}
    for number, region in regions.items():
        image_id = rows[number]["image_id"]
        known = {"things of the image that are asked for": str(len(things[image_id]))}
        features[key_of(rows[number])] = {**groups_of_region(region, sizes[image_id]), **known}
    return features


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


@torch.no_grad()
def draw_row(row: dict, model: TripsModel, collator: ImageBatchCollator) -> list[tuple[str, PIL.Image.Image]]:
    """
    Draw the kept patches of a row, with a title and a drawing for each of its images and each selection layer.

    Args:
        row (`dict`): row of a data set.
        model ([`TripsModel`]): in evaluation mode.
        collator ([`ImageBatchCollator`]): collator of the task, for evaluation.
    """
    images, index = collator.distinct_images([row])
    selections = model(**a_text_per_image(collator([row]))).selection
    shown = [images[number] for number in torch.tensor(index).flatten().tolist()]
    sizes = [(image.height, image.width) for image in shown]
    pictures = []
    for layer, selection in zip(model.config.vision_config.schedule.layers, selections):
        for image, boxes in zip(shown, collator.processor.patch_boxes(selection.kept_indices, sizes)):
            pictures.append((f"layer {layer}: {len(boxes)} patches", draw_kept_patches(image, boxes)))
    return pictures
