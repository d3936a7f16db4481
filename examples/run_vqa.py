r"""
Train and evaluate TRIPS on visual question answering.

    python examples/run_vqa.py                  # easy-VQA, the tiny preset: runs on a laptop
    python examples/run_vqa.py --keep_rate 1.0 --output_dir unpruned  # unpruned baseline
    accelerate launch examples/run_vqa.py --train_file train.jsonl --validation_file val.jsonl --image_root images \
        --preset base --tokenizer_name bert-base-uncased

The training loop is Transformers' `Seq2SeqTrainer`, whose options are options here.
"""

from trips_examples.training.options import DataArguments, ModelArguments, TripsTrainingArguments
from trips_examples.training.parser import run_script
from trips_examples.training.question_answering import train_question_answering
from trips_examples.training.runs import parse_arguments


def main(argv: list[str] | None = None) -> dict[str, float]:
    return train_question_answering(
        *parse_arguments(argv, ModelArguments, DataArguments, TripsTrainingArguments, description=__doc__)
    )


if __name__ == "__main__":
    run_script(main)
