"""
Training and evaluation on questions. It is here, and not in run_vqa.py, since models of other tasks begin with it.
"""

from collections.abc import Sequence
from pathlib import Path

import evaluate
from datasets import Dataset
from transformers import EvalPrediction, TrainerCallback

from modeling_trips import TripsForQuestionAnswering
from trips_examples.data.rows import column_of
from trips_examples.data.task_collators import VqaCollator
from trips_examples.data.texts import with_fitting_texts
from trips_examples.metrics import VQA_ACCURACY
from trips_examples.metrics.groups import accuracy_by_group
from trips_examples.metrics.selection import diagnose_selection
from trips_examples.training.files import write_json
from trips_examples.training.models import ModelStart
from trips_examples.training.options import DataArguments, ModelArguments, TripsTrainingArguments
from trips_examples.training.predictions import texts_of, write_predictions
from trips_examples.training.runs import load_data, train_and_evaluate
from trips_examples.training.trainer import ImageGroupedTrainer


def write_answers(folder: Path, dataset: Dataset, answers: list[str], metric: evaluate.Metric, num_shown: int = 20):
    """
    Writes `predictions.jsonl`, an object per question, and `accuracy_by_answer.json`; prints the frequent answers.
    """
    columns = ["source", "question_id", "question", "answers"]
    write_predictions(folder, dataset, columns, ({"prediction": answer} for answer in answers))
    result = metric.compute(predictions=answers, references=column_of(dataset, "answers"), by_answer=True)
    write_json(folder / "accuracy_by_answer.json", result["by_answer"])
    for answer, row in list(result["by_answer"].items())[:num_shown]:
        print(f"  {answer:<20} {row['accuracy']:7.2%} of {row['count']}")


def train_question_answering(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TripsTrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Trains a model to answer questions, and evaluates it, as these options say; returns the metrics of both."""
    start = ModelStart(TripsForQuestionAnswering, model_args, image_size=data_args.side_of_scenes("vqa"))
    data = load_data("vqa", data_args, training_args, start.patch_size)
    model, processor = start.finish(data_args.vocabulary(data, "question", "answers"))
    data = with_fitting_texts(data, "vqa", processor, skip=data_args.skip_bad_rows)
    model.generation_config.update(max_new_tokens=training_args.generation_max_length or 10, max_length=None)
    metric = evaluate.load(VQA_ACCURACY)

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        answers = texts_of(prediction.predictions, processor)
        return metric.compute(predictions=answers, references=column_of(data["validation"], "answers"))

    trainer = ImageGroupedTrainer(
        model=model,
        args=training_args,
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        data_collator=VqaCollator(processor),
        train_collator=VqaCollator(processor, training=True, augment=data_args.augments),
        processing_class=processor,
        selection_teacher=model_args.make_selection_teacher(training_args.device),
        compute_metrics=accuracy,
        callbacks=list(callbacks),
    )

    def evaluate_answers() -> dict[str, float]:
        output = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
        answers = texts_of(output.predictions, processor)
        if trainer.is_world_process_zero():
            write_answers(Path(training_args.output_dir), data["validation"], answers, metric)
        groups = accuracy_by_group(metric, answers, column_of(data["validation"], "answers"), data["validation"])
        samples = {"eval_samples": len(data["validation"])}
        return {**output.metrics, **groups, **diagnose_selection(trainer), **samples}

    return train_and_evaluate(trainer, evaluate_answers)
