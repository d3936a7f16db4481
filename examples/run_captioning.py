r"""
Train and evaluate TRIPS on image captioning. The text is a prompt, the same for all images. A model from scratch
selects patches by the image in early layers, and by the prompt in the last one.

    python examples/run_captioning.py --model examples/trips-tiny-scenes-unpruned --grid 2 \
        --image_size 48 --schedule 3:image:0.7,4:text:0.3  # bundled scenes
    accelerate launch examples/run_captioning.py --train_file train.json --validation_file val.json \
        --image_root images --model pretrained --image_size 384 --learning_rate 1e-5 \
        --per_device_train_batch_size 32 --generation_num_beams 5

The scores need the extra `captioning`, METEOR needs Java.
"""

from trips_examples.training.options import run_script, task_parser


OPTIONS = task_parser("captioning", __doc__, __name__)

from transformers import EvalPrediction

from modeling_trips import TripsForConditionalGeneration
from trips_examples.data.collators import CaptionCollator
from trips_examples.data.images import one_row_per_image
from trips_examples.metrics.caption_metrics import CaptionMetrics, split_words
from trips_examples.metrics.diagnostics import variety, warn_of_unwritable_texts
from trips_examples.training.files import texts_of, write_predictions
from trips_examples.training.runs import parse_arguments, train_and_evaluate
from trips_examples.training.start import start_run
from trips_examples.training.trainer import ImageGroupedTrainer


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, task_args, data_args, training_args = parse_arguments(OPTIONS, argv)
    metric = CaptionMetrics()
    writing = {
        "num_beams": training_args.generation_num_beams or 1,
        "length_penalty": task_args.length_penalty,
        "no_repeat_ngram_size": task_args.no_repeat_ngram_size,
    }
    # The captions of an image share its prompt, so that each image has one text.
    model, processor, data = start_run(
        TripsForConditionalGeneration, "captions", model_args, data_args, training_args, group_size=1
    )
    unwritable = warn_of_unwritable_texts(data, "caption", processor, split_words)
    longest = training_args.generation_max_length or model.config.decoder_config.max_position_embeddings
    model.generation_config.update(max_new_tokens=longest, max_length=None, **writing)
    model.generation_config.validate(strict=True)  # not when it is saved
    references = {}
    for split in data.keys() & {"validation", "test"}:
        data[split], references[split] = one_row_per_image(data[split])

    def metrics_of(prediction: EvalPrediction) -> dict[str, float]:
        rows = trainer.eval_dataset
        truths = references[trainer.split]
        captions = texts_of(prediction.predictions, processor)
        scores = metric.compute(predictions=captions, references=truths)
        if trainer.is_in_train:
            return scores
        first_truths = [own_truths[0] for own_truths in truths]
        pairs = zip(truths, captions, strict=True)
        predictions = [{"captions": own_truths, "prediction": caption} for own_truths, caption in pairs]
        write_predictions(training_args.output_dir, rows, ["source", "image_id"], predictions)
        return {
            **scores,
            **variety(captions, first_truths, "caption"),
            "unwritable_captions": unwritable[trainer.split],
            "samples": len(rows),
        }

    trainer = ImageGroupedTrainer(
        model=model,
        args=training_args,
        data=data,
        data_collator=CaptionCollator(processor, prompt=task_args.prompt),
        train_collator=CaptionCollator(processor, training=True, prompt=task_args.prompt),
        processing_class=processor,
        compute_metrics=metrics_of,
    )
    return train_and_evaluate(trainer)


if __name__ == "__main__":
    run_script(main)
