r"""
Train and evaluate TRIPS on statements about two images: true or false (NLVR2).

    python examples/run_nlvr2.py --model examples/trips-tiny-scenes-unpruned --grid 2 --image_size 48 \
        --train_scenes 5000 --texts_per_image 8 --per_device_train_batch_size 240 --max_steps 300  # bundled scenes
    accelerate launch examples/run_nlvr2.py --train_file train.json --validation_file dev.json --image_root images \
        --model pretrained --learning_rate 2e-5 --per_device_train_batch_size 32 \
        --num_train_epochs 10

The training loop is Transformers' `Trainer`, whose options are options here.
"""

from trips_examples.training.options import DataArguments, ModelArguments, TrainingOptions, make_parser, run_script


OPTIONS = make_parser(
    ModelArguments,
    DataArguments,
    TrainingOptions,
    description=__doc__,
    script=__name__,
    task="nlvr2",
    num_train_epochs=10.0,
    per_device_train_batch_size=64,
    learning_rate=5e-4,
)

import numpy as np
import torch
from transformers import EvalPrediction

from modeling_trips import TripsForImagesAndTextClassification
from trips_examples.data.collators import Nlvr2Collator
from trips_examples.data.images import column_of
from trips_examples.metrics.selection import diagnose_selection
from trips_examples.metrics.texts import variety
from trips_examples.training.files import write_predictions
from trips_examples.training.models import start_run
from trips_examples.training.runs import parse_arguments, train_and_evaluate
from trips_examples.training.trainer import ImageGroupedTrainer


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(axis=-1) == prediction.label_ids).mean())}


def judgements_of(logits: np.ndarray) -> list[dict]:
    """Of logits of shape `(num_statements, 2)`, for each statement whether it is true, and the probability of that."""
    probabilities = torch.from_numpy(logits).float().softmax(dim=-1)[:, 1].tolist()
    return [{"prediction": int(probability > 0.5), "probability": probability} for probability in probabilities]


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse_arguments(OPTIONS, argv)
    arguments = model_args, data_args, training_args
    model, processor, data = start_run(
        TripsForImagesAndTextClassification, "nlvr2", *arguments, num_images=2, num_labels=2
    )
    trainer = ImageGroupedTrainer(
        model=model,
        args=training_args,
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        data_collator=Nlvr2Collator(processor),
        processing_class=processor,
        compute_metrics=accuracy,
    )

    def evaluate() -> dict[str, float]:
        output = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
        predictions = judgements_of(output.predictions)
        if trainer.is_world_process_zero():
            columns = ["source", "question_id", "statement", "label"]
            write_predictions(training_args.output_dir, trainer.eval_dataset, columns, predictions)
        labels = column_of(trainer.eval_dataset, "label")
        chosen = [each["prediction"] for each in predictions]
        varied = variety(chosen, labels, "label", lambda label: labels.count(label[0]) / len(labels))
        return {**output.metrics, **varied, **diagnose_selection(trainer), "eval_samples": len(labels)}

    return train_and_evaluate(trainer, evaluate, data.get("test"))


if __name__ == "__main__":
    run_script(main)
