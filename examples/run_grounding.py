r"""
Train and evaluate TRIPS on visual grounding: the box of what an expression refers to (RefCOCO, RefCOCO+, RefCOCOg).

    python examples/run_grounding.py --model examples/trips-tiny-scenes-unpruned --schedule 2:text:0.25 \
        --selection_gate 0.2 --selection_loss_weight 0 --attention_loss_weight 2  # bundled scenes
    accelerate launch examples/run_grounding.py --train_file train.jsonl --validation_file val.jsonl \
        --image_root images --model pretrained --image_size 384 --learning_rate 2e-5 \
        --per_device_train_batch_size 32
"""

from trips_examples.training.options import config_fields, run_script, task_parser


OPTIONS = task_parser("grounding", __doc__, __name__)

from collections.abc import Callable
from functools import partial
from pathlib import Path

import PIL.Image
import torch
from datasets import Dataset
from transformers import EvalPrediction

from modeling_trips import TripsForVisualGrounding, TripsPreTrainedModel, TripsProcessor
from modeling_trips.inspection import draw_kept_patches
from modeling_trips.inspection.files import whole_file
from trips_examples.data.collators import GroundingCollator
from trips_examples.data.images import column_of, image_size, read_image
from trips_examples.metrics.diagnostics import accuracy_by_group, diagnose_selection
from trips_examples.metrics.grounding_accuracy import GroundingAccuracy
from trips_examples.training.files import draw_boxes, sheet, write_predictions
from trips_examples.training.models import start_run
from trips_examples.training.runs import parse_arguments, train_and_evaluate
from trips_examples.training.trainer import ImageGroupedTrainer


@torch.inference_mode()
def image_with_kept_patches(row: dict, model: TripsPreTrainedModel, processor: TripsProcessor) -> PIL.Image.Image:
    """Draw the image of a row with faded patches that the last selection layer drops."""
    image = read_image(row)
    inputs = processor(images=image, text=row["expression"], return_tensors="pt").to(model.device)
    selection = model.base_model(**inputs).selection
    if not selection:
        return image
    (kept,) = processor.patch_boxes(selection[-1].kept_indices, [(image.height, image.width)])
    return draw_kept_patches(image, kept, min_side=1)


def draw_predicted_boxes(
    path: Path,
    dataset: Dataset,
    boxes: list[list[float]],
    num_pictures: int,
    image_of: Callable[[dict], PIL.Image.Image] = read_image,
):
    """Draw predicted and true boxes of evenly spaced rows on the images of `image_of`."""
    step = max(1, len(dataset) // num_pictures)
    rows = dataset.select(range(0, len(dataset), step)[:num_pictures])
    pictures = [draw_boxes(image_of(row), row["box"], box) for row, box in zip(rows, boxes[::step])]
    with whole_file(path) as whole:
        sheet(pictures, column_of(rows, "expression")).save(whole)


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, task_args, data_args, training_args = parse_arguments(OPTIONS, argv)
    arguments = model_args, data_args, training_args
    model, processor, data = start_run(TripsForVisualGrounding, "grounding", *arguments, **config_fields(task_args))
    metric = GroundingAccuracy()

    def metrics_of(prediction: EvalPrediction) -> dict[str, float]:
        rows, truths = trainer.eval_dataset, column_of(trainer.eval_dataset, "box")
        sizes = [image_size(row) for row in rows]
        boxes = processor.post_process_grounding(torch.from_numpy(prediction.predictions), sizes).tolist()
        scores = metric.compute(predictions=boxes, references=truths)
        if trainer.is_in_train:
            return scores
        if trainer.is_world_process_zero():
            folder = training_args.output_dir
            predictions = ({"prediction": [round(number, 2) for number in box]} for box in boxes)
            write_predictions(folder, rows, ["source", "question_id", "expression", "box"], predictions)
            if task_args.num_pictures:
                image_of = partial(image_with_kept_patches, model=model.eval(), processor=processor)
                draw_predicted_boxes(Path(folder, "predictions.png"), rows, boxes, task_args.num_pictures, image_of)
        groups = accuracy_by_group(metric, boxes, truths, rows)
        return {**scores, **groups, **diagnose_selection(trainer), "samples": len(rows)}

    trainer = ImageGroupedTrainer(
        model=model,
        args=training_args,
        data=data,
        data_collator=GroundingCollator(processor),
        processing_class=processor,
        compute_metrics=metrics_of,
    )
    return train_and_evaluate(trainer)


if __name__ == "__main__":
    run_script(main)
