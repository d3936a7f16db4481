"""Files of a run: predictions, rankings and figures."""

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from datasets import Dataset

from modeling_trips import TripsPreTrainedModel, TripsProcessor
from modeling_trips.inspection import draw_kept_patches
from trips_examples.data.boxes import draw_boxes, sheet
from trips_examples.data.images import column_of, images_of, read_image, without_decoding
from trips_examples.metrics.retrieval import Ranking, RetrievalResults
from trips_examples.training.files import write_json_lines, write_whole


KIND_COLUMNS = ("kind", "answer_type")


def texts_of(sequences: np.ndarray, processor: TripsProcessor) -> list[str]:
    """Decode generated tokens of shape `(num_texts, text_length)`, which `Trainer` pads with -100."""
    return processor.post_process_answers(np.where(sequences < 0, processor.tokenizer.pad_token_id, sequences))


def write_predictions(folder: str | Path, dataset: Dataset, columns: list[str], predictions: Iterable[dict]):
    """
    Write `predictions.jsonl` with an object per row: these columns, `image` (or `images`), the prediction, and
    `KIND_COLUMNS` if present. An image is its path, or its `image_id` if the data hold it encoded.
    """
    columns = [*columns, *(column for column in KIND_COLUMNS if column in dataset.column_names)]
    images = ["images", "image_ids"] if "images" in dataset.column_names else ["image", "image_id"]
    texts, images = dataset.select_columns(columns), without_decoding(dataset.select_columns(images))
    rows = zip(texts, map(_image_names, images), predictions, strict=True)
    lines = ({**row, **names, **prediction} for row, names, prediction in rows)
    write_json_lines(Path(folder, "predictions.jsonl"), lines)


def _image_names(row: dict) -> dict:
    if "images" in row:
        return {"images": [image["path"] or name for image, name in zip(row["images"], row["image_ids"])]}
    return {"image": row["image"]["path"] or row["image_id"]}


def write_rankings(folder: str | Path, dataset: Dataset, results: RetrievalResults):
    """
    Write `found_images.jsonl`, an object per caption, and `found_texts.jsonl`, one per image, with the ten best
    candidates and the rank of the first correct one.
    """
    rows, _ = images_of(dataset)
    sources, image_ids = column_of(dataset, "source"), column_of(dataset.select(rows), "image_id")

    def write(name: str, queries: Iterable[dict], ranking: Ranking, candidates: list[str]):
        found = zip(queries, ranking.candidates.tolist(), ranking.first_right.tolist(), strict=True)
        lines = (
            {**query, "found": [candidates[number] for number in best[:10]], "first_right": first + 1}
            for query, best, first in found
        )
        write_json_lines(Path(folder, name), lines)

    write("found_images.jsonl", dataset.select_columns(["source", "caption"]), results.found_images, image_ids)
    write("found_texts.jsonl", [{"image_id": image_id} for image_id in image_ids], results.found_texts, sources)


@torch.inference_mode()
def image_with_kept_patches(row: dict, text: str, model: TripsPreTrainedModel, processor: TripsProcessor):
    """Draw the image of a row with faded patches that the last selection layer drops."""
    image = read_image(row)
    inputs = processor(images=image, text=text, return_tensors="pt").to(model.device)
    selection = model.base_model(**inputs).selection
    if not selection:
        return image
    (kept,) = processor.patch_boxes(selection[-1].kept_indices, [(image.height, image.width)])
    return draw_kept_patches(image, kept, min_side=1)


def draw_predicted_boxes(
    folder: str | Path,
    dataset: Dataset,
    boxes: list[list[float]],
    num_pictures: int,
    image_of: Callable[[dict], PIL.Image.Image] = read_image,
):
    """
    Draw `predictions.png`: predicted and true boxes of evenly spaced rows on the images of `image_of`.
    """
    step = max(1, len(dataset) // num_pictures)
    rows = dataset.select(range(0, len(dataset), step)[:num_pictures])
    pictures = [draw_boxes(image_of(row), row["box"], box) for row, box in zip(rows, boxes[::step])]
    png = io.BytesIO()
    sheet(pictures, column_of(rows, "expression")).save(png, "PNG")
    write_whole(Path(folder, "predictions.png"), png.getvalue())


def plot_training(history: list[dict], path: Path):
    """
    Draw the training loss and the first metric of the evaluations over steps.

    Args:
        history (`list[dict]`): Entries as in `TrainerState.log_history`, with `step` and `loss` or `eval_...`.
        path (`Path`): File to write; its suffix sets the format.
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
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."))
    write_whole(path, content.getvalue())
