r"""
Train and evaluate TRIPS on statements about two images: true or false (NLVR2).

    python examples/run_nlvr2.py --model examples/trips-tiny-scenes-unpruned --grid 2 --image_size 48 \
        --train_scenes 5000 --texts_per_image 8 --per_device_train_batch_size 240 --max_steps 300  # bundled scenes
    accelerate launch examples/run_nlvr2.py --train_file train.json --validation_file dev.json --image_root images \
        --model pretrained --learning_rate 2e-5 --per_device_train_batch_size 32 \
        --num_train_epochs 10
"""

from trips_examples.training.options import run_script, task_parser


OPTIONS = task_parser("nlvr2", __doc__, __name__)

from statistics import fmean

import torch
from transformers import EvalPrediction

from modeling_trips import TripsForImagesAndTextClassification
from trips_examples.data.collators import Nlvr2Collator
from trips_examples.data.images import column_of
from trips_examples.metrics.diagnostics import diagnose_selection, variety
from trips_examples.training.files import write_predictions
from trips_examples.training.runs import parse_arguments, train_and_evaluate
from trips_examples.training.start import start_run
from trips_examples.training.trainer import ImageGroupedTrainer


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse_arguments(OPTIONS, argv)
    model, processor, data = start_run(
        TripsForImagesAndTextClassification,
        "nlvr2",
        model_args,
        data_args,
        training_args,
        num_images=2,
        num_labels=2,
    )

    def metrics_of(prediction: EvalPrediction) -> dict[str, float]:
        rows = trainer.eval_dataset
        logits = torch.from_numpy(prediction.predictions).float()
        probabilities = logits.softmax(dim=-1)[:, 1].tolist()
        labels = column_of(rows, "label")
        chosen = [int(probability > 0.5) for probability in probabilities]
        accuracy = fmean(own == label for own, label in zip(chosen, labels))
        if trainer.is_in_train:
            return {"accuracy": accuracy}
        columns = ["source", "question_id", "statement", "label"]
        pairs = zip(chosen, probabilities)
        judgements = [{"prediction": own, "probability": probability} for own, probability in pairs]
        write_predictions(training_args.output_dir, rows, columns, judgements)
        varied = variety(chosen, labels, "label", lambda label: labels.count(label[0]) / len(labels))
        return {"accuracy": accuracy, **varied, **diagnose_selection(trainer), "samples": len(rows)}

    trainer = ImageGroupedTrainer(
        model=model,
        args=training_args,
        data=data,
        data_collator=Nlvr2Collator(processor),
        processing_class=processor,
        compute_metrics=metrics_of,
    )
    return train_and_evaluate(trainer)


if __name__ == "__main__":
    run_script(main)
