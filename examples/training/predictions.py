"""What an evaluation leaves besides its metrics: what was predicted of each row, or found by it, and pictures."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from datasets import Dataset

from modeling_trips import TripsPreTrainedModel, TripsProcessor
from modeling_trips.inspection import draw_kept_patches
from trips_examples.data.boxes import draw_boxes, sheet
from trips_examples.data.rows import column_of, images_of, read_image
from trips_examples.metrics.retrieval import Ranking, RetrievalResults
from trips_examples.training.files import write_json_lines


KIND_COLUMNS = ("kind", "answer_type")  # of item, for `analyze_errors.py`


def texts_of(sequences: np.ndarray, processor: TripsProcessor) -> list[str]:
    """The texts that a model wrote: tokens of shape `(num_texts, text_length)`, filled up with -100 by `Trainer`."""
    return processor.post_process_answers(np.where(sequences < 0, processor.tokenizer.pad_token_id, sequences))


def write_predictions(folder: str | Path, dataset: Dataset, columns: list[str], predictions: Iterable[dict]):
    """
    Writes `predictions.jsonl`: an object per row with these of its columns, and what was predicted of it; where the
    data have `KIND_COLUMNS`, with these, too.
    """
    columns = [*columns, *(column for column in KIND_COLUMNS if column in dataset.column_names)]
    rows = zip(dataset.select_columns(columns), predictions, strict=True)
    write_json_lines(Path(folder, "predictions.jsonl"), ({**row, **prediction} for row, prediction in rows))


def write_rankings(folder: str | Path, dataset: Dataset, results: RetrievalResults, num_shown: int = 10):
    """
    Writes `found_images.jsonl`, an object per caption, and `found_texts.jsonl`, one per image: the best that it found,
    and the place of the first right one, from 1.
    """
    rows, _ = images_of(dataset)
    sources, image_ids = column_of(dataset, "source"), column_of(dataset.select(rows), "image_id")

    def write(name: str, queries: Iterable[dict], ranking: Ranking, candidates: list[str]):
        found = zip(queries, ranking.candidates.tolist(), ranking.first_right.tolist(), strict=True)
        lines = (
            {**query, "found": [candidates[number] for number in best[:num_shown]], "first_right": first + 1}
            for query, best, first in found
        )
        write_json_lines(Path(folder, name), lines)

    write("found_images.jsonl", dataset.select_columns(["source", "caption"]), results.found_images, image_ids)
    write("found_texts.jsonl", [{"image_id": image_id} for image_id in image_ids], results.found_texts, sources)


@torch.inference_mode()
def image_with_kept_patches(row: dict, text: str, model: TripsPreTrainedModel, processor: TripsProcessor):
    """The image of a row, all faded but what the last selection layer keeps under `text`; whole where none selects."""
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
    Draws `predictions.png`: a sheet of predicted boxes beside the true ones on what `image_of` makes of their rows,
    evenly spread over the data set.
    """
    step = max(1, len(dataset) // num_pictures)
    rows = dataset.select(range(0, len(dataset), step)[:num_pictures])
    pictures = [draw_boxes(image_of(row), row["box"], box) for row, box in zip(rows, boxes[::step])]
    partial = Path(folder, "partial-predictions.png")
    sheet(pictures, column_of(rows, "expression")).save(partial)
    partial.replace(Path(folder, "predictions.png"))
