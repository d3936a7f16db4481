"""Is the selection of a trained model healthy? What `eval_results.json` says about it, for any task."""

import torch
from transformers import Trainer

from modeling_trips import TripsProcessor, TripsSelection
from modeling_trips.inspection import (
    kept_coverage,
    num_kept,
    score_entropy,
    share_inside,
    share_shown,
    text_sensitivity,
)
from trips_examples.data.rows import image_size


NUM_ROWS = 256
# Where data says what a text is about: columns with a box (x0, y0, x1, y1) in pixels of the image, or None.
REGION_COLUMNS = ("region", "box")


@torch.no_grad()
def diagnose_selection(trainer: Trainer, prefix: str = "eval") -> dict[str, float]:
    """
    Runs the model on the first rows of the evaluation data and describes what each selection layer keeps.

    Args:
        trainer (`Trainer`): with a TRIPS model, an evaluation data set, its collator and a [`TripsProcessor`].
        prefix (`str`, *optional*, defaults to `"eval"`): begins the names.

    Returns:
        `dict[str, float]`: for selection layer L `{prefix}_layer{L}_kept` (the mean number of candidates that go on),
        `_entropy`, `_coverage`, `_text_sensitivity` (where texts share images) and, where the data has regions,
        `_inside` (`{prefix}_inside_at_random` is what patches drawn at random would give) and `_shown`. Empty where
        nothing is selected.
    """
    model, processor = trainer.accelerator.unwrap_model(trainer.model).eval(), trainer.processing_class
    rows = [trainer.eval_dataset[row] for row in range(min(NUM_ROWS, len(trainer.eval_dataset)))]
    inputs = trainer.data_collator(rows)
    inputs.pop("sources", None)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    selections = model(**inputs).selection
    height, width = inputs["pixel_values"].shape[-2:]
    num_patches = (height // processor.patch_size) * (width // processor.patch_size)
    metrics = {}
    for layer, selection in zip(model.config.vision_config.selection_schedule, selections):
        name = f"{prefix}_layer{layer}"
        metrics[f"{name}_kept"] = num_kept(selection).float().mean().item()
        metrics[f"{name}_entropy"] = score_entropy(selection).mean().item()
        metrics[f"{name}_coverage"] = kept_coverage(selection, num_patches)
        if len(inputs["image_index"].unique()) < inputs["image_index"].numel():
            sensitivity = text_sensitivity(selection, inputs["image_index"].flatten(), num_patches)
            metrics[f"{name}_text_sensitivity"] = sensitivity
        metrics |= _inside(selection, rows, processor, name, prefix)
    return metrics


def _inside(
    selection: TripsSelection, rows: list[dict], processor: TripsProcessor, name: str, prefix: str
) -> dict[str, float]:
    column = next((column for column in REGION_COLUMNS if column in rows[0]), None)
    about = [number for number, row in enumerate(rows) if column is not None and row[column] is not None]
    if not about:
        return {}
    sizes = [image_size(rows[number]) for number in about]
    boxes = processor.patch_boxes([selection.kept_indices[number] for number in about], sizes)
    regions = [torch.tensor(rows[number][column], dtype=torch.float32) for number in about]
    shares = [share_inside(kept, region) for kept, region in zip(boxes, regions)]
    shown = [share_shown(kept, region) for kept, region in zip(boxes, regions)]
    areas = [
        ((region[2] - region[0]) * (region[3] - region[1])).item() / (height * width)
        for region, (height, width) in zip(regions, sizes)
    ]
    return {
        f"{name}_inside": sum(shares) / len(shares),
        f"{name}_shown": sum(shown) / len(shown),
        f"{prefix}_inside_at_random": sum(areas) / len(areas),
    }
