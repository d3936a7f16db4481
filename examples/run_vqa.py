"""
Train and evaluate TRIPS on visual question answering.

    accelerate launch examples/run_vqa.py                  # easy-VQA, the tiny preset: runs on a laptop
    accelerate launch examples/run_vqa.py --keep_rate 1.0  # its unpruned twin
    accelerate launch examples/run_vqa.py --train_file train.jsonl --validation_file val.jsonl --image_root images \
        --preset base --tokenizer_name bert-base-uncased

The training loop is Transformers' `Seq2SeqTrainer`: see `--help` for all of its options.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
import transformers
from datasets import Dataset, DatasetDict
from example_datasets import load_vqa_dataset, train_wordpiece_tokenizer
from example_training import (
    ImageGroupedTrainer,
    TripsTrainingArguments,
    VqaCollator,
    checkpoint_to_resume,
    make_processor,
    without_decoding,
    without_long_questions,
    write_whole,
)
from transformers import AutoModelForVisualQuestionAnswering, AutoTokenizer, HfArgumentParser, set_seed

from modeling_trips import TripsConfig, TripsForQuestionAnswering, TripsProcessor


logger = logging.getLogger(__name__)

METRIC = str(Path(__file__).with_name("vqa_accuracy.py"))


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A TRIPS checkpoint to start from, with its processor. Default: from scratch."}
    )
    preset: str = field(
        default="tiny", metadata={"help": f"Size of a model from scratch: one of {', '.join(TripsConfig.presets())}."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer of a model from scratch. Default: a WordPiece trained on the training texts."},
    )
    image_size: int | None = field(default=None, metadata={"help": "Height and width in pixels."})
    selection_layers: list[int] | None = field(
        default=None, metadata={"help": "ViT layers that select patches, numbered from 1: --selection_layers 5 10"}
    )
    keep_rate: list[float] | None = field(
        default=None, metadata={"help": "Share of the tokens kept: one rate, or one per layer. 1.0: no selection."}
    )
    selection_guidance: str | None = field(default=None, metadata={"help": "What selects: text, image or random."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2. eager trains fastest on CPUs at small sizes."}
    )

    def config_overrides(self) -> dict:
        """The fields of `TripsConfig` that were given."""
        rate = self.keep_rate[0] if self.keep_rate is not None and len(self.keep_rate) == 1 else self.keep_rate
        fields = {
            "selection_layers": self.selection_layers,
            "keep_rate": rate,
            "selection_guidance": self.selection_guidance,
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass
class DataArguments:
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "easy_vqa (the default), easy_vqa_scenes, or the name of a data set on the Hub."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    train_file: str | None = field(
        default=None, metadata={"help": "JSON, JSONL, CSV or Parquet with image, question and answer or answers."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "As train_file."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths are relative to."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip and count unusable rows instead of stopping."})
    grid: int = field(default=2, metadata={"help": "Tiles along each side of an easy_vqa_scenes image."})
    augment: bool | None = field(
        default=None, metadata={"help": "Random flips and shifts. Default: for easy_vqa and its scenes only."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first questions."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first questions."})

    @property
    def is_embedded(self) -> bool:
        no_file = self.train_file is None and self.validation_file is None
        return no_file and self.dataset_name in (None, "easy_vqa", "easy_vqa_scenes")


def load_data(args: DataArguments, training_args: TripsTrainingArguments) -> DatasetDict:
    data = load_vqa_dataset(
        args.dataset_name,
        args.dataset_config_name,
        train_file=args.train_file,
        validation_file=args.validation_file,
        image_root=args.image_root,
        skip_bad_rows=args.skip_bad_rows,
        grid=args.grid,
        seed=training_args.seed,
    )
    for split, wanted in (("train", training_args.do_train), ("validation", training_args.do_eval)):
        if wanted and split not in data:
            action = {"train": "--do_train", "validation": "--do_eval"}[split]
            raise ValueError(f"There is no {split} split: give --{split}_file, or turn {action} off ({action} False).")
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    for split, limit in limits.items():
        if limit is not None and split in data:
            data[split] = data[split].select(range(min(limit, len(data[split]))))
    if "validation" in data:  # questions of one image side by side share its computation
        data["validation"] = data["validation"].sort("image_id")
    return data


def load_model(args: ModelArguments, data: DatasetDict) -> tuple[TripsForQuestionAnswering, TripsProcessor]:
    """A checkpoint and its processor, or a model from scratch with a tokenizer to go with it."""
    if args.model_name_or_path is not None:
        model = TripsForQuestionAnswering.from_pretrained(
            args.model_name_or_path, attn_implementation=args.attn_implementation, **args.config_overrides()
        )
        processor = TripsProcessor.from_pretrained(args.model_name_or_path)
        if args.image_size is not None:
            processor.image_processor.size = {"height": args.image_size, "width": args.image_size}
        return model, processor
    if args.tokenizer_name is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
    else:
        answers = (answer for row in data["train"]["answers"] for answer in row)
        tokenizer = train_wordpiece_tokenizer([*data["train"]["question"], *answers])
    for name in ("pad_token", "cls_token", "sep_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(
                f"--tokenizer_name {args.tokenizer_name}: it has no `{name}`. Take a BERT-like tokenizer."
            )
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    config = TripsConfig.from_preset(
        args.preset,
        text_config=vocabulary,
        decoder_config=ends,
        vision_config={} if args.image_size is None else {"image_size": args.image_size},
        **args.config_overrides(),
    )
    model = AutoModelForVisualQuestionAnswering.from_config(config, attn_implementation=args.attn_implementation)
    return model, make_processor(tokenizer, config)


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
    parser = HfArgumentParser((ModelArguments, DataArguments, TripsTrainingArguments), description=__doc__)
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(args=argv)
    level = logging.INFO if training_args.should_log else logging.WARNING  # one process speaks for all
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level)
    transformers.utils.logging.set_verbosity_warning()
    set_seed(training_args.seed)

    data = load_data(data_args, training_args)
    if data_args.dataset_name == "easy_vqa_scenes" and model_args.image_size is None:
        model_args.image_size = 64 * data_args.grid  # the size of the scenes
    model, processor = load_model(model_args, data)
    for split in data:
        data[split] = without_long_questions(data[split], processor, skip=data_args.skip_bad_rows)
    model.generation_config.update(max_new_tokens=training_args.generation_max_length or 10, max_length=None)
    logger.info("%s parameters, %s", f"{model.num_parameters():,}", model.config.vision_config.selection_schedule)

    metric = evaluate.load(METRIC)

    def answers_of(prediction) -> list[str]:
        # `Seq2SeqTrainer` keeps the rows that fill up the last batch of several processes: they come last.
        sequences = prediction.predictions[: len(data["validation"])]
        return processor.post_process_answers(np.where(sequences < 0, processor.tokenizer.pad_token_id, sequences))

    def accuracy(prediction) -> dict:
        return metric.compute(predictions=answers_of(prediction), references=data["validation"]["answers"])

    augment = data_args.is_embedded if data_args.augment is None else data_args.augment
    trainer = ImageGroupedTrainer(
        model=model,
        args=training_args,
        train_dataset=without_decoding(data["train"]) if training_args.do_train else None,
        eval_dataset=without_decoding(data["validation"]) if training_args.do_eval else None,
        data_collator=VqaCollator(processor),
        train_collator=VqaCollator(processor, training=True, augment=augment),
        processing_class=processor,
        compute_metrics=accuracy,
    )
    metrics = {}
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args))
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        metrics |= result.metrics
    if training_args.do_eval:
        output = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
        output.metrics["eval_samples"] = len(data["validation"])
        trainer.log_metrics("eval", output.metrics)
        trainer.save_metrics("eval", output.metrics)
        metrics |= output.metrics
        if trainer.is_world_process_zero():
            write_evaluation(Path(training_args.output_dir), data["validation"], answers_of(output), metric)
    return metrics


if __name__ == "__main__":
    main()
