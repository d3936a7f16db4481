r"""
Train and evaluate TRIPS on visual question answering.

    python examples/run_vqa.py --model examples/trips-tiny-scenes-unpruned --schedule 2:text:0.1 \
        --selection_loss_weight 0                                                # bundled scenes, from answers alone
    python examples/run_vqa.py --train_file train.jsonl --validation_file val.jsonl  # your own: docs/pictures.md
"""

from trips_examples.training.options import DataArguments, ModelArguments, run_script, task_parser


OPTIONS = task_parser("vqa", __doc__, __name__)

from transformers import EvalPrediction

from modeling_trips import TripsForQuestionAnswering
from trips_examples.data.collators import VqaCollator
from trips_examples.data.images import column_of
from trips_examples.metrics.calibration import calibrate
from trips_examples.metrics.diagnostics import (
    accuracy_by_group,
    diagnose_selection,
    measurable_answers,
    most_tokens,
    variety,
    warn_of_unwritable_texts,
)
from trips_examples.metrics.vqa_accuracy import VqaAccuracy, answer_score, most_common_answer, normalize_answer
from trips_examples.training.files import texts_of, write_predictions
from trips_examples.training.runs import TripsTrainingArguments, parse_arguments, train_and_evaluate
from trips_examples.training.start import start_run
from trips_examples.training.trainer import ImageGroupedTrainer


def train_question_answering(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TripsTrainingArguments,
) -> dict[str, float]:
    """Train and evaluate a question-answering model, and return the metrics."""
    model, processor, data = start_run(TripsForQuestionAnswering, "vqa", model_args, data_args, training_args)
    if training_args.do_train:  # those of the start; `calibrate` finds the new ones
        model.config.update({"confidence_temperature": 1.0, "question_tokens": None})
    unwritable = warn_of_unwritable_texts(data, "answers", processor, normalize_answer)
    longest = training_args.generation_max_length or max(10, most_tokens(data, "answers", processor))
    model.generation_config.update(max_new_tokens=longest, max_length=None)
    metric = VqaAccuracy()

    def metrics_of(prediction: EvalPrediction) -> dict[str, float]:
        rows = trainer.eval_dataset
        answers = texts_of(prediction.predictions, processor)
        references = measurable_answers(column_of(rows, "answers"), processor)
        scores = metric.compute(predictions=answers, references=references)
        if trainer.is_in_train:
            return scores
        columns = ["source", "question_id", "question", "answers"]
        predictions = [{"prediction": answer} for answer in answers]
        write_predictions(training_args.output_dir, rows, columns, predictions)
        truths = [most_common_answer(each) for each in references]

        def accuracy_of(answers: list[str]) -> float:
            return metric.compute(predictions=answers, references=references)["accuracy"]

        return {
            **scores,
            **variety(answers, truths, "answer", accuracy_of),
            **accuracy_by_group(metric, answers, references, rows),
            **diagnose_selection(trainer),
            **calibrate(trainer, prediction.predictions, list(map(answer_score, answers, references))),
            "unwritable_answers": unwritable[trainer.split],
            "samples": len(rows),
        }

    trainer = ImageGroupedTrainer(
        model=model,
        args=training_args,
        data=data,
        data_collator=VqaCollator(processor),
        train_collator=VqaCollator(processor, training=True),
        processing_class=processor,
        compute_metrics=metrics_of,
    )
    return train_and_evaluate(trainer)


def main(argv: list[str] | None = None) -> dict[str, float]:
    return train_question_answering(*parse_arguments(OPTIONS, argv))


if __name__ == "__main__":
    run_script(main)
