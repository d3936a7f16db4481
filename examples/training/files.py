"""Files of a run: results, predictions and figures. A file is whole or absent."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageOps
from datasets import Dataset

from modeling_trips import TripsProcessor
from modeling_trips.inspection.files import whole_file
from trips_examples.data.images import without_decoding


TRUE_COLOR, PREDICTED_COLOR = "#2b8a3e", "#1864ab"  # kept patches have orange outlines
SIDE = 240  # pixels of a drawn image


def write_whole(path: str | Path, content: str | bytes):
    """Write a file atomically, and make its folder."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: str | Path, value):
    """Write indented JSON atomically."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def texts_of(sequences: np.ndarray, processor: TripsProcessor) -> list[str]:
    """Decode generated tokens of shape `(num_texts, text_length)`, which `Trainer` pads with -100."""
    return processor.post_process_answers(np.where(sequences < 0, processor.tokenizer.pad_token_id, sequences))


def write_predictions(folder: str | Path, dataset: Dataset, columns: list[str], predictions: Iterable[dict]):
    """
    Write `predictions.jsonl` with an object per row: these columns, `image` (or `images`), the prediction, and `kind`
    if present. An image is its path, or its `image_id` if the data hold it encoded.
    """
    columns = [*columns, "kind"] if "kind" in dataset.column_names else columns
    images = ["images", "image_ids"] if "images" in dataset.column_names else ["image", "image_id"]
    texts, images = dataset.select_columns(columns), without_decoding(dataset.select_columns(images))
    rows = zip(texts, map(_image_names, images), predictions, strict=True)
    lines = (json.dumps({**row, **names, **own}, ensure_ascii=False) + "\n" for row, names, own in rows)
    write_whole(Path(folder, "predictions.jsonl"), "".join(lines))


def _image_names(row: dict) -> dict:
    if "images" in row:
        return {"images": [image["path"] or name for image, name in zip(row["images"], row["image_ids"])]}
    return {"image": row["image"]["path"] or row["image_id"]}


def plot_training(history: list[dict], path: Path, unpruned_steps: int = 0):
    """
    Draw the training loss and the first metric of the evaluations over steps, from `TrainerState.log_history`, and
    where pruning begins, after `unpruned_steps`.
    """
    from matplotlib.figure import Figure  # slow to import

    technical = ("_loss", "_runtime", "_per_second", "_samples", "_images")
    names = [name for entry in history for name in entry if name.startswith("eval_") and not name.endswith(technical)]
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ["loss", *names[:1]]):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        axes.plot(*zip(*points), marker="." if len(points) < 30 else "")
        axes.set(xlabel="step", ylabel=name.replace("_", " "))
        axes.grid(alpha=0.3)
        if unpruned_steps:
            axes.axvline(unpruned_steps, color="black", linestyle="--", label="pruned from here on")
            axes.legend()
    with whole_file(path) as partial:
        figure.savefig(partial)


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
