"""Files of a run: results and predictions. A file is whole or absent."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset

from modeling_trips import TripsProcessor
from modeling_trips.inspection.files import whole_file
from trips_examples.data.images import without_decoding


def write_whole(path: str | Path, text: str):
    """Write a file atomically, and make its folder."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value):
    """Write indented JSON atomically."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def texts_of(sequences: np.ndarray, processor: TripsProcessor) -> list[str]:
    """Decode generated tokens of shape `(num_texts, text_length)`, which `Trainer` pads with -100."""
    return processor.post_process_answers(np.where(sequences < 0, processor.tokenizer.pad_token_id, sequences))


def write_predictions(folder: str | Path, dataset: Dataset, columns: list[str], predictions: Iterable[dict]):
    """
    Write `predictions.jsonl` in the main process with an object per row: these columns, `image` (or `images`), the
    prediction, and `kind` if present. An image is its path, or its `image_id` if the data hold it encoded.
    """
    if not PartialState().is_main_process:
        return
    if "kind" in dataset.column_names:
        columns = [*columns, "kind"]
    image_columns = ["images", "image_ids"] if "images" in dataset.column_names else ["image", "image_id"]
    texts = dataset.select_columns(columns)
    images = without_decoding(dataset.select_columns(image_columns))
    lines = []
    for row, image_row, prediction in zip(texts, images, predictions, strict=True):
        if "images" in image_row:
            pairs = zip(image_row["images"], image_row["image_ids"])
            row["images"] = [image["path"] or name for image, name in pairs]
        else:
            row["image"] = image_row["image"]["path"] or image_row["image_id"]
        lines.append(json.dumps({**row, **prediction}, ensure_ascii=False) + "\n")
    write_whole(Path(folder, "predictions.jsonl"), "".join(lines))
