"""
Train and evaluate TRIPS on visual grounding: the box of what an expression refers to (RefCOCO, RefCOCO+, RefCOCOg).

    accelerate launch examples/run_grounding.py                  # scenes of easy-VQA images, the tiny preset
    accelerate launch examples/run_grounding.py --keep_rate 1.0 --output_dir unpruned  # its twin
    accelerate launch examples/run_grounding.py --train_file train.jsonl --validation_file val.jsonl \
        --image_root images --model_name_or_path pretrained --image_size 384 --learning_rate 2e-5 \
        --per_device_train_batch_size 32

The training loop is Transformers' `Trainer`: see `--help` for all of its options.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import torch
from datasets import Dataset

from modeling_trips import TripsForVisualGrounding, convert_to_rgb
from trips_examples.data.boxes import draw_boxes, sheet
from trips_examples.data.collators import image_size, read_image, without_long_texts
from trips_examples.data.task_collators import GroundingCollator
from trips_examples.metrics import GROUNDING_ACCURACY
from trips_examples.metrics.selection import diagnose_selection
from trips_examples.training.files import write_whole
from trips_examples.training.models import load_model
from trips_examples.training.options import DataArguments, ModelArguments
from trips_examples.training.runs import end_processes, load_data, parse_arguments, train_and_evaluate
from trips_examples.training.start import StartedTrainingArguments, start_from_questions
from trips_examples.training.trainer import ImageGroupedTrainer


@dataclass
class GroundingArguments(DataArguments):
    augment: bool | None = field(
        default=None,
        metadata={
            "help": "Random sideways flips, which mirror the boxes and swap the words left and right. Default: for "
            "scenes only."
        },
    )
    num_pictures: int = field(
        default=0, metadata={"help": "How many predictions to draw beside the true boxes, in predictions.png."}
    )


def write_predictions(path: Path, dataset: Dataset, boxes: list[list[float]]):
    """An object per expression, with the true box and the predicted one in pixels of the image."""
    columns = ["source", "question_id", "expression", "box"]
    lines = [
        json.dumps({**row, "prediction": [round(number, 2) for number in box]}, ensure_ascii=False)
        for row, box in zip(dataset.select_columns(columns), boxes, strict=True)
    ]
    write_whole(path, "".join(f"{line}\n" for line in lines))


def draw_predictions(path: Path, dataset: Dataset, boxes: list[list[float]], num_pictures: int):
    """A sheet of predictions, evenly spread over the data set."""
    step = max(1, len(dataset) // num_pictures)
    rows = dataset.select(range(0, len(dataset), step)[:num_pictures])
    pictures = [draw_boxes(convert_to_rgb(read_image(row)), row["box"], box) for row, box in zip(rows, boxes[::step])]
    partial = path.with_name(f"partial-{path.name}")
    sheet(pictures, rows["expression"]).save(partial)
    partial.replace(path)


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse_arguments(
        argv, ModelArguments, GroundingArguments, StartedTrainingArguments, description=__doc__
    )
    model_args = start_from_questions(model_args, data_args, training_args)
    data = load_data("grounding", data_args, training_args)
    texts, side = data_args.vocabulary(data, "expression"), data_args.half_scene_size("grounding")
    model, processor = load_model(TripsForVisualGrounding, model_args, texts, image_size=side)
    data = without_long_texts(data, "expression", processor, skip=data_args.skip_bad_rows)
    metric = evaluate.load(GROUNDING_ACCURACY)

    def boxes_of(prediction) -> list[list[float]]:
        validation = data["validation"].select_columns(["image", "image_id", "source"])
        sizes = {row["image_id"]: image_size(row) for row in validation}
        in_order = [sizes[image_id] for image_id in validation["image_id"]]
        return processor.post_process_grounding(torch.from_numpy(prediction.predictions), in_order).tolist()

    def accuracy(prediction) -> dict[str, float]:
        return metric.compute(predictions=boxes_of(prediction), references=data["validation"]["box"])

    trainer = ImageGroupedTrainer(
        model=model,
        args=training_args,
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        data_collator=GroundingCollator(processor),
        train_collator=GroundingCollator(processor, training=True, augment=data_args.augments),
        processing_class=processor,
        compute_metrics=accuracy,
    )

    def evaluate_boxes() -> dict[str, float]:
        output = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
        if trainer.is_world_process_zero():
            folder, boxes = Path(training_args.output_dir), boxes_of(output)
            write_predictions(folder / "predictions.jsonl", data["validation"], boxes)
            if data_args.num_pictures:
                draw_predictions(folder / "predictions.png", data["validation"], boxes, data_args.num_pictures)
        return {**output.metrics, **diagnose_selection(trainer), "eval_samples": len(data["validation"])}

    return train_and_evaluate(trainer, evaluate_boxes)


if __name__ == "__main__":
    main()
    end_processes()
