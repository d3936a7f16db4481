"""
Train and evaluate TRIPS on visual question answering.

    accelerate launch examples/run_vqa.py                  # easy-VQA, the tiny preset: runs on a laptop
    accelerate launch examples/run_vqa.py --keep_rate 1.0 --output_dir unpruned  # its twin
    accelerate launch examples/run_vqa.py --train_file train.jsonl --validation_file val.jsonl --image_root images \
        --preset base --tokenizer_name bert-base-uncased

The training loop is Transformers' `Seq2SeqTrainer`: see `--help` for all of its options.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import evaluate
import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from example_collators import ImageBatchCollator, without_long_texts
from example_training import (
    DataArguments,
    ImageGroupedTrainer,
    ModelArguments,
    TripsTrainingArguments,
    end_processes,
    load_data,
    load_model,
    parse_arguments,
    train_and_evaluate,
    write_whole,
)
from selection_diagnostics import diagnose_selection

from modeling_trips import TripsForQuestionAnswering


METRIC = str(Path(__file__).with_name("vqa_accuracy.py"))


@dataclass
class VqaCollator(ImageBatchCollator):
    """
    Rows of `example_tasks.VQA_FEATURES` -> inputs of [`TripsForQuestionAnswering`]. In training all distinct
    answers of a question become labels, weighted by how many annotators gave them (`text_index`, `loss_weights`). In
    evaluation the label is the most common answer.
    """

    def encode(self, images: list[PIL.Image.Image], image_index: list[int], rows: list[dict]) -> dict:
        inputs = self.processor(
            images=images, text=[row["question"] for row in rows], image_index=image_index, return_tensors="pt"
        )
        return {**inputs, **(self.weighted_labels(rows) if self.training else self.single_labels(rows))}

    def single_labels(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        answers = [max(row["answers"], key=row["answers"].count) for row in rows]
        return {"labels": self.processor.encode_answers(answers)}

    def weighted_labels(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        triples = [
            (question, answer, row["answers"].count(answer) / len(row["answers"]))
            for question, row in enumerate(rows)
            for answer in dict.fromkeys(row["answers"])
        ]
        text_index, answers, weights = zip(*triples)
        return {
            "labels": self.processor.encode_answers(answers),
            "text_index": torch.tensor(text_index),
            "loss_weights": torch.tensor(weights),
        }


def write_evaluation(folder: Path, dataset: Dataset, answers: list[str], metric: evaluate.Metric, num_shown: int = 20):
    """
    Writes `predictions.jsonl`, an object per question, and `accuracy_by_answer.json`; prints the frequent answers.
    """
    columns = ("source", "question_id", "question", "answers")
    rows = (
        {**{name: row[name] for name in columns}, "prediction": answer}
        for row, answer in zip(dataset.remove_columns("image"), answers, strict=True)
    )
    write_whole(folder / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    result = metric.compute(predictions=answers, references=dataset["answers"], by_answer=True)
    write_whole(folder / "accuracy_by_answer.json", json.dumps(result["by_answer"], indent=2) + "\n")
    for answer, row in list(result["by_answer"].items())[:num_shown]:
        print(f"  {answer:<20} {row['accuracy']:7.2%} of {row['count']}")


def main(argv: list[str] | None = None) -> dict[str, float]:
    return train(*parse_arguments(argv, ModelArguments, DataArguments, TripsTrainingArguments, description=__doc__))


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: TripsTrainingArguments
) -> dict[str, float]:
    """Trains and evaluates as these say; returns the metrics."""
    data = load_data("vqa", data_args, training_args)
    texts, side = data_args.vocabulary(data, "question", "answers"), data_args.scene_size("vqa")
    model, processor = load_model(TripsForQuestionAnswering, model_args, texts, image_size=side)
    data = without_long_texts(data, "question", processor, skip=data_args.skip_bad_rows)
    model.generation_config.update(max_new_tokens=training_args.generation_max_length or 10, max_length=None)

    metric = evaluate.load(METRIC)

    def answers_of(prediction) -> list[str]:
        sequences = prediction.predictions
        return processor.post_process_answers(np.where(sequences < 0, processor.tokenizer.pad_token_id, sequences))

    def accuracy(prediction) -> dict:
        return metric.compute(predictions=answers_of(prediction), references=data["validation"]["answers"])

    trainer = ImageGroupedTrainer(
        model=model,
        args=training_args,
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        data_collator=VqaCollator(processor),
        train_collator=VqaCollator(processor, training=True, augment=data_args.augments),
        processing_class=processor,
        compute_metrics=accuracy,
    )

    def evaluate_answers() -> dict[str, float]:
        output = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
        if trainer.is_world_process_zero():
            write_evaluation(Path(training_args.output_dir), data["validation"], answers_of(output), metric)
        return {**output.metrics, **diagnose_selection(trainer), "eval_samples": len(data["validation"])}

    return train_and_evaluate(trainer, evaluate_answers)


if __name__ == "__main__":
    main()
    end_processes()
