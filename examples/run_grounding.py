r"""
Train and evaluate TRIPS on visual grounding: the box of what an expression refers to (RefCOCO, RefCOCO+, RefCOCOg).

    python examples/run_grounding.py --model examples/trips-tiny-scenes-unpruned --schedule 2:text:0.25 \
        --learns_relevance True --selection_loss_weight 0 --attention_loss_weight 2  # bundled scenes
    accelerate launch examples/run_grounding.py --train_file train.jsonl --validation_file val.jsonl \
        --image_root images --model pretrained --image_size 384 --learning_rate 2e-5 \
        --per_device_train_batch_size 32
"""

from trips_examples.training.options import config_fields, run_script, task_parser


OPTIONS = task_parser("grounding", __doc__, __name__)

import torch
from transformers import EvalPrediction

from modeling_trips import TripsForVisualGrounding
from trips_examples.data.collators import GroundingCollator
from trips_examples.data.images import column_of, image_size
from trips_examples.metrics.diagnostics import accuracy_by_group, diagnose_selection
from trips_examples.metrics.grounding_accuracy import GroundingAccuracy
from trips_examples.training.files import write_predictions
from trips_examples.training.runs import parse_arguments, train_and_evaluate
from trips_examples.training.start import start_run
from trips_examples.training.trainer import ImageGroupedTrainer


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, task_args, data_args, training_args = parse_arguments(OPTIONS, argv)
    model, processor, data = start_run(
        TripsForVisualGrounding, "grounding", model_args, data_args, training_args, **config_fields(task_args)
    )
    metric = GroundingAccuracy()

    def metrics_of(prediction: EvalPrediction) -> dict[str, float]:
        rows = trainer.eval_dataset
        truths = column_of(rows, "box")
        sizes = [image_size(row) for row in rows]
        outputs = torch.from_numpy(prediction.predictions)
        boxes = processor.post_process_grounding(outputs, sizes).tolist()
        scores = metric.compute(predictions=boxes, references=truths)
        if trainer.is_in_train:
            return scores
        columns = ["source", "question_id", "expression", "box"]
        predictions = ({"prediction": [round(number, 2) for number in box]} for box in boxes)
        write_predictions(training_args.output_dir, rows, columns, predictions)
        scale = torch.tensor([[width, height, width, height] for height, width in sizes])
        mean_box = (torch.tensor(truths) / scale).mean(dim=0)
        same = metric.compute(predictions=(mean_box * scale).tolist(), references=truths)
        return {
            **scores,
            "accuracy_mean_box": same["accuracy"],
            **accuracy_by_group(metric, boxes, truths, rows),
            **diagnose_selection(trainer),
            "samples": len(rows),
        }

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
