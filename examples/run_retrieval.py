r"""
Train and evaluate TRIPS on image-text retrieval: texts find images, images find texts.

    python examples/run_retrieval.py --model examples/trips-tiny-scenes-unpruned --grid 2 \
        --image_size 48 --schedule 3:image:0.7,4:text:0.3  # bundled scenes
    accelerate launch examples/run_retrieval.py --train_file train.jsonl --validation_file val.jsonl \
        --image_root images --model albef_trips --rerank_k 128 --learning_rate 1e-5

Two losses are added: contrast (ITC) of each image and text with all of the batch, of all processes, and matching
(ITM) on hard negatives, which each process draws from its own part of the batch. Accumulating gradients enlarges
neither: the loss is then the mean of the losses of smaller batches.
"""

from trips_examples.training.options import config_fields, run_script, task_parser


OPTIONS = task_parser("retrieval", __doc__, __name__)

from modeling_trips import TripsForRetrieval
from trips_examples.data.collators import RetrievalCollator
from trips_examples.training.retrieval import RetrievalTrainer
from trips_examples.training.runs import parse_arguments, train_and_evaluate
from trips_examples.training.start import start_run


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, task_args, data_args, training_args = parse_arguments(OPTIONS, argv)
    model, processor, data = start_run(
        TripsForRetrieval, "captions", model_args, data_args, training_args, **config_fields(task_args)
    )
    trainer = RetrievalTrainer(
        model=model,
        args=training_args,
        task_args=task_args,
        data=data,
        data_collator=RetrievalCollator(processor),
        processing_class=processor,
    )
    return train_and_evaluate(trainer)


if __name__ == "__main__":
    run_script(main)
