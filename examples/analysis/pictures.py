"""Drawings of kept patches and scores, and groups of rows by their target region."""

from collections import defaultdict
from dataclasses import dataclass

import PIL.Image
import PIL.ImageDraw
import torch
from datasets import Dataset

from modeling_trips import TripsModel, TripsProcessor
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


@dataclass
class KeptPatches:
    """
    Drawing of the patches that a model keeps.

    Args:
        model ([`TripsModel`]): in evaluation mode.
        processor ([`TripsProcessor`])
        collator ([`ImageBatchCollator`]): collator of the task, for evaluation.
    """

    model: TripsModel
    processor: TripsProcessor
    collator: ImageBatchCollator

    @torch.no_grad()
    def draw(self, row: dict) -> list[tuple[str, PIL.Image.Image]]:
        """Return a title and a drawing for each image of the row and each selection layer."""
        images, index = self.collator.distinct_images([row])
        selections = self.model(**a_text_per_image(self.collator([row]))).selection
        shown = [images[number] for number in torch.tensor(index).flatten().tolist()]
        pictures = []
        for layer, selection in zip(self.model.config.vision_config.schedule.layers, selections):
            sizes = [(image.height, image.width) for image in shown]
            for image, boxes in zip(shown, self.processor.patch_boxes(selection.kept_indices, sizes)):
                pictures.append((f"layer {layer}: {len(boxes)} patches", draw_kept_patches(image, boxes)))
        return pictures
