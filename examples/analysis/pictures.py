"""What a model kept of the images of a row, and what the data say of a row that its prediction does not."""

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
    """More groups of rows, by key: size and place of what they are about, and how many things of an image are."""
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


def draw_scores(
    image: PIL.Image.Image, boxes: torch.Tensor, scores: torch.Tensor, color: str = "#d9480f", min_side: int = 256
) -> PIL.Image.Image:
    """
    Draw the image in grey, each candidate the more colored the higher its score, up to the highest.

    Args:
        image (`PIL.Image.Image`): The original image. It is drawn with a longer side of at most 1024 pixels.
        boxes (`torch.Tensor` of shape `(num_candidates, 4)`): (x0, y0, x1, y1) in pixels of the image.
        scores (`torch.Tensor` of shape `(num_candidates,)`): At least 0. Square roots are shown, as most are small.
        color (`str`, *optional*): Color of the highest score.
        min_side (`int`, *optional*, defaults to 256): Smaller images are enlarged by a whole factor.
    """
    image, scale = fit_for_drawing(image, min_side)
    grey = image.convert("L").convert("RGB")
    opacity = PIL.Image.new("L", grey.size)
    draw = PIL.ImageDraw.Draw(opacity)
    strength = (scores / scores.max().clamp_min(1e-12)).sqrt()
    for (x0, y0, x1, y1), share in zip((boxes.cpu() * scale).round().int().tolist(), strength.tolist()):
        if x0 < x1 and y0 < y1:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=round(230 * share))
    return PIL.Image.composite(PIL.Image.new("RGB", grey.size, color), grey, opacity)


@dataclass
class KeptPatches:
    """
    Draws what a model keeps.

    Args:
        model ([`TripsModel`]): in evaluation mode.
        processor ([`TripsProcessor`])
        collator ([`ImageBatchCollator`]): of the rows' task, for evaluation.
    """

    model: TripsModel
    processor: TripsProcessor
    collator: ImageBatchCollator

    @torch.no_grad()
    def draw(self, row: dict) -> list[tuple[str, PIL.Image.Image]]:
        """A title and a picture for each image of the row and each selection layer."""
        images, index = self.collator.distinct_images([row])
        selections = self.model(**a_text_per_image(self.collator([row]))).selection
        shown = [images[number] for number in torch.tensor(index).flatten().tolist()]
        pictures = []
        for layer, selection in zip(self.model.config.vision_config.schedule.layers, selections):
            sizes = [(image.height, image.width) for image in shown]
            for image, boxes in zip(shown, self.processor.patch_boxes(selection.kept_indices, sizes)):
                pictures.append((f"layer {layer}: {len(boxes)} patches", draw_kept_patches(image, boxes)))
        return pictures
