"""Training and evaluation of question answering."""

import logging
from dataclasses import replace
from pathlib import Path

import evaluate
from accelerate import PartialState
from datasets import Dataset
from transformers import EvalPrediction

from modeling_trips import TripsForQuestionAnswering
from trips_examples.data.rows import column_of
from trips_examples.data.scenes import TILE_SIZE
from trips_examples.data.task_collators import VqaCollator
from trips_examples.data.texts import with_fitting_texts
from trips_examples.metrics import VQA_ACCURACY
from trips_examples.metrics.groups import accuracy_by_group
from trips_examples.metrics.selection import diagnose_selection
from trips_examples.training.files import write_json
from trips_examples.training.models import ModelStart, make_selection_teacher
from trips_examples.training.options import DataArguments, ModelArguments, TripsTrainingArguments
from trips_examples.training.predictions import texts_of, write_predictions
from trips_examples.training.runs import load_data, train_and_evaluate
from trips_examples.training.trainer import ImageGroupedTrainer


logger = logging.getLogger(__name__)

START_EPOCHS = 6.0


def write_answers(folder: Path, dataset: Dataset, answers: list[str], metric: evaluate.Metric):
    """Write `predictions.jsonl` and `accuracy_by_answer.json`, and print the 20 most frequent answers."""
    columns = ["source", "question_id", "question", "answers"]
    write_predictions(folder, dataset, columns, ({"prediction": answer} for answer in answers))
    result = metric.compute(predictions=answers, references=column_of(dataset, "answers"), by_answer=True)
    write_json(folder / "accuracy_by_answer.json", result["by_answer"])
    for answer, row in list(result["by_answer"].items())[:20]:
        print(f"  {answer:<20} {row['accuracy']:7.2%} of {row['count']}")


def train_question_answering(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TripsTrainingArguments,
) -> dict[str, float]:
    """Train and evaluate a question-answering model, and return the metrics."""
    start = ModelStart(TripsForQuestionAnswering, model_args, image_size=data_args.side_of_scenes("vqa"))
    data = load_data("vqa", data_args, training_args, start.patch_size)
    model, processor = start.finish(data_args.vocabulary(data, "question", "answers"))
    data = with_fitting_texts(data, "vqa", processor, skip=data_args.skip_bad_rows)
    model.generation_config.update(max_new_tokens=training_args.generation_max_length or 10, max_length=None)
    metric = evaluate.load(VQA_ACCURACY)

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        answers = texts_of(prediction.predictions, processor)
        return metric.compute(predictions=answers, references=column_of(trainer.eval_dataset, "answers"))

    trainer = ImageGroupedTrainer(
        model=model,
        args=training_args,
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        data_collator=VqaCollator(processor),
        train_collator=VqaCollator(processor, training=True, augment=data_args.augments),
        processing_class=processor,
        selection_teacher=make_selection_teacher(model_args, training_args.device),
        compute_metrics=accuracy,
    )

    def evaluate_answers() -> dict[str, float]:
        rows = trainer.eval_dataset
        output = trainer.predict(rows, metric_key_prefix="eval")
        answers = texts_of(output.predictions, processor)
        if trainer.is_world_process_zero():
            write_answers(Path(training_args.output_dir), rows, answers, metric)
        groups = accuracy_by_group(metric, answers, column_of(rows, "answers"), rows)
        return {**output.metrics, **groups, **diagnose_selection(trainer), "eval_samples": len(rows)}

    return train_and_evaluate(trainer, evaluate_answers, data.get("test"))


def start_from_questions(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TripsTrainingArguments,
    start_epochs: float | None,
    image_size: int | None,
) -> ModelArguments:
    """
    Train new models for bundled data on easy-VQA at half size first, because NLVR2 and grounding alone do not teach
    words and shapes well.

    Args:
        model_args, data_args, training_args: Options of the task.
        start_epochs (`float`, *optional*): Epochs on easy-VQA. Default: 6, or none with `--max_steps`.
        image_size (`int`, *optional*): Side of the task's images in pixels if `model_args` has none.

    Returns:
        `ModelArguments`: Options to start from that model, or `model_args`.
    """
    if model_args.starts_from_weights or not data_args.is_embedded or not training_args.do_train:
        return model_args
    if start_epochs is None and training_args.max_steps > 0:
        logger.warning("--max_steps skips the training on easy-VQA. Give --start_epochs to run it.")
        return model_args
    epochs = START_EPOCHS if start_epochs is None else start_epochs
    if epochs == 0:
        return model_args
    if training_args.deepspeed_plugin is not None:
        raise ValueError("DeepSpeed trains one model per launch. Give --model_name_or_path or --start_epochs 0.")
    folder = Path(training_args.output_dir) / "easy_vqa"
    if training_args.resume_from_checkpoint is None or not (folder / "train_results.json").exists():
        logger.info("Training on easy-VQA first (--start_epochs %g) in %s", epochs, folder)
        questions_args = replace(  # type: ignore[call-arg]  # fields of Transformers
            training_args,
            output_dir=str(folder),
            do_train=True,
            do_eval=False,
            do_predict=False,
            num_train_epochs=epochs,
            max_steps=-1,
            per_device_train_batch_size=TripsTrainingArguments.per_device_train_batch_size,
            learning_rate=TripsTrainingArguments.learning_rate,
            eval_strategy="no",
            save_strategy="no",
            resume_from_checkpoint=None,
        )
        questions = DataArguments(max_train_samples=data_args.max_train_samples)
        started_args = replace(model_args, image_size=TILE_SIZE // 2, attention_loss_weight=None)
        train_question_answering(started_args, questions, questions_args)
        PartialState().wait_for_everyone()
    return replace(model_args, model_name_or_path=str(folder), image_size=model_args.image_size or image_size)
