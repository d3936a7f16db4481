"""Pictures of a run: the course of the training, and predictions on the patches that the model keeps."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageOps
import torch
from transformers import Trainer

from modeling_trips.inspection import draw_kept_patches
from modeling_trips.inspection.files import whole_file
from trips_examples.data.images import read_image


TRUE_COLOR = "#2b8a3e"  # kept patches have orange outlines
PREDICTED_COLOR = "#1864ab"
SIDE = 240  # pixels of a drawn image
TITLE_LINES = 3
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
        if boxes is None:
            pictures.append(PIL.ImageOps.contain(picture, (SIDE, SIDE)))
        else:
            pictures.append(draw_boxes(picture, row["box"], boxes[number]))
    with whole_file(Path(trainer.args.output_dir, "predictions.png")) as partial:
        sheet(pictures, [titles[number] for number in numbers]).save(partial)


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


def draw_boxes(image: PIL.Image.Image, true_box: Sequence[float], predicted_box: Sequence[float]) -> PIL.Image.Image:
    """Draw the true box in green and the predicted box in blue. The image's longer side becomes `SIDE` pixels."""
    picture = PIL.ImageOps.contain(image, (SIDE, SIDE))
    scale = SIDE / max(image.size)
    draw = PIL.ImageDraw.Draw(picture)
    for box, color in ((true_box, TRUE_COLOR), (predicted_box, PREDICTED_COLOR)):
        corners = [number * scale for number in box]
        draw.rectangle(corners, outline=color, width=3)
    return picture


def sheet(pictures: list[PIL.Image.Image], titles: list[str]) -> PIL.Image.Image:
    """Arrange images of at most `SIDE` pixels in rows of four, with a title of up to `TITLE_LINES` below each."""
    num_columns = 4
    line_height = 17
    cell_width = SIDE + 10
    cell_height = SIDE + 12 + TITLE_LINES * line_height
    num_rows = -(-len(pictures) // num_columns)
    whole = PIL.Image.new("RGB", (num_columns * cell_width, num_rows * cell_height), "white")
    draw = PIL.ImageDraw.Draw(whole)
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        row, column = divmod(number, num_columns)
        x = column * cell_width + 5
        y = row * cell_height + 5
        whole.paste(picture, (x, y))
        lines = textwrap.wrap(title, width=38, max_lines=TITLE_LINES, placeholder=" ...")
        for line_number, line in enumerate(lines):
            draw.text((x, y + SIDE + 4 + line_number * line_height), line, fill="black", font_size=13)
    return whole
