"""Pictures of a run: the course of the training, and predictions on the patches that the model keeps."""

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import torch
from transformers import Trainer

from modeling_trips.inspection import draw_kept_patches
from modeling_trips.inspection.files import whole_file
from trips_examples.data.images import read_image


TRUE_COLOR = "#2b8a3e"  # kept patches have orange outlines
PREDICTED_COLOR = "#1864ab"
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "image_index")


def plot_training(history: list[dict], path: Path, unpruned_steps: int = 0, majority: float | None = None):
    """
    Draw the training loss over steps, that of relevance if there is one, and the first metric of the evaluations if
    there are two after different steps.

    Args:
        history (`list[dict]`): The `TrainerState.log_history`.
        path (`Path`): The picture.
        unpruned_steps (`int`, *optional*, defaults to 0): Number of steps after which pruning begins; a line.
        majority (`float`, *optional*): Accuracy of the most frequent answer; a line beside the metric.
    """
    from matplotlib.figure import Figure  # slow to import

    names = ["loss"]
    if any("relevance_loss" in entry for entry in history):
        names.append("relevance_loss")
    metric = first_metric(history)
    if metric is not None and len({entry["step"] for entry in history if metric in entry}) > 1:
        names.append(metric)
    figure = Figure(figsize=(5 * len(names), 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names):
        steps = [entry["step"] for entry in history if name in entry]
        values = [entry[name] for entry in history if name in entry]
        axes.plot(steps, values, marker="." if len(steps) < 30 else "")
        axes.set(xlabel="step", ylabel=name.replace("_", " "))
        axes.grid(alpha=0.3)
        if unpruned_steps:
            axes.axvline(unpruned_steps, color="black", linestyle="--", label="pruned from here on")
        if majority is not None and name == metric:
            axes.axhline(majority, color="gray", linestyle=":", label="the most frequent answer")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    with whole_file(path) as partial:
        figure.savefig(partial)


def first_metric(history: list[dict]) -> str | None:
    """Return the name of the first metric of the evaluations, without losses, times and counts."""
    technical = ("_loss", "_runtime", "_per_second", "_samples", "_images")
    for entry in history:
        for name in entry:
            if name.startswith("eval_") and not name.endswith(technical):
                return name
    return None


def draw_predictions(
    trainer: Trainer,
    titles: Sequence[str],
    row_of: Callable[[int], dict] | None = None,
    boxes: Sequence[Sequence[float]] | None = None,
):
    """
    Draw `predictions.png` in the output folder, unless `num_pictures` is 0: evenly spaced rows of the evaluated split,
    with the patches that the last selection layer keeps.

    Args:
        trainer (`ImageGroupedTrainer`): The trainer. Other processes than the first draw nothing.
        titles (`Sequence[str]`): A line for each row of the split: prediction and truth.
        row_of (`Callable`, *optional*): Function of a number that returns the row to draw. Default: that of the split.
        boxes (`Sequence`, *optional*): A predicted box for each row, drawn beside the true one.
    """
    num_pictures = trainer.args.num_pictures
    if num_pictures == 0 or not trainer.is_world_process_zero():
        return
    step = max(1, len(titles) // num_pictures)
    numbers = range(0, len(titles), step)[:num_pictures]
    pictures = []
    for number in numbers:
        row = trainer.eval_dataset[number] if row_of is None else row_of(number)
        picture = picture_of(trainer, row)
        if boxes is not None:
            draw_boxes(picture, row["box"], boxes[number])
        pictures.append(picture)
    write_sheet(pictures, [titles[number] for number in numbers], Path(trainer.args.output_dir, "predictions.png"))


@torch.inference_mode()
def picture_of(trainer: Trainer, row: dict) -> PIL.Image.Image:
    """Draw the image of a row, or its images side by side. Patches that the last selection layer drops are faded."""
    is_pair = "images" in row
    encoded_images = row["images"] if is_pair else [row["image"]]
    images = [read_image({"image": image}) for image in encoded_images]
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    batch = trainer.data_collator([row])
    inputs = {name: batch[name].to(model.device) for name in MODEL_INPUTS if name in batch}
    encoder = model if is_pair else model.base_model  # only the head for pairs takes two images
    selection = encoder(**inputs).selection
    if selection:
        sizes = [(image.height, image.width) for image in images]
        boxes = trainer.processing_class.patch_boxes(selection[-1].kept_indices, sizes)
        images = [draw_kept_patches(image, kept, min_side=1) for image, kept in zip(images, boxes, strict=True)]
    width = sum(image.width for image in images)
    height = max(image.height for image in images)
    whole = PIL.Image.new("RGB", (width, height), "white")
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width
    return whole


def draw_boxes(picture: PIL.Image.Image, true_box: Sequence[float], predicted_box: Sequence[float]):
    """Draw the true box in green and the predicted box in blue, both (x0, y0, x1, y1) in pixels."""
    draw = PIL.ImageDraw.Draw(picture)
    for box, color in ((true_box, TRUE_COLOR), (predicted_box, PREDICTED_COLOR)):
        draw.rectangle(list(box), outline=color, width=max(1, max(picture.size) // 80))


def write_sheet(pictures: list[PIL.Image.Image], titles: list[str], path: str | Path):
    """Write a picture of images in rows of four, with up to three lines of a title above each."""
    from matplotlib.figure import Figure  # slow to import

    num_rows = math.ceil(len(pictures) / 4)
    figure = Figure(figsize=(10, 3 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, 4, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, picture, title in zip(panels, pictures, titles):
        axes.imshow(picture)
        lines = textwrap.wrap(title, width=38, max_lines=3, placeholder=" ...")
        axes.set_title("\n".join(lines), fontsize=8)
    with whole_file(path) as partial:
        figure.savefig(partial)
