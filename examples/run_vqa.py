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
import os
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import transformers
from datasets import DatasetDict
from example_datasets import load_vqa_dataset, train_wordpiece_tokenizer
from example_training import (
    ImageGroupedTrainer,
    TripsTrainingArguments,
    VqaCollator,
    checkpoint_to_resume,
    make_processor,
    without_decoding,
)
from transformers import AutoTokenizer, HfArgumentParser, set_seed

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


def load_data(args: DataArguments, seed: int) -> DatasetDict:
    data = load_vqa_dataset(
        args.dataset_name,
        args.dataset_config_name,
        train_file=args.train_file,
        validation_file=args.validation_file,
        image_root=args.image_root,
        skip_bad_rows=args.skip_bad_rows,
        grid=args.grid,
        seed=seed,
    )
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
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    config = TripsConfig.from_preset(
        args.preset,
        text_config=vocabulary,
        decoder_config=ends,
        vision_config={} if args.image_size is None else {"image_size": args.image_size},
        **args.config_overrides(),
    )
    config._attn_implementation = args.attn_implementation
    return TripsForQuestionAnswering(config), make_processor(tokenizer, config)


def write_predictions(path: Path, dataset, answers: list[str]):
    """One JSON object per question: source, question, human answers, the model's answer."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row, answer in zip(dataset.remove_columns("image"), answers, strict=True):
            kept = {name: row[name] for name in ("source", "question", "answers")}
            file.write(json.dumps({**kept, "prediction": answer}, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((ModelArguments, DataArguments, TripsTrainingArguments), description=__doc__)
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(args=argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=training_args.get_process_log_level())
    transformers.utils.logging.set_verbosity_warning()
    set_seed(training_args.seed)

    data = load_data(data_args, training_args.seed)
    model, processor = load_model(model_args, data)
    model.generation_config.update(max_new_tokens=10, max_length=None)
    logger.info("%s parameters, %s", f"{model.num_parameters():,}", model.config.vision_config.selection_schedule)

    metric = evaluate.load(METRIC)

    def answers_of(prediction) -> list[str]:
        # `Seq2SeqTrainer` keeps the rows that fill up the last batch of several processes: they come last.
        sequences = prediction.predictions[: len(data["validation"])]
        return processor.post_process_answers(sequences.clip(min=0))

    def accuracy(prediction) -> dict:
        references = data["validation"]["answers"]
        return metric.compute(predictions=answers_of(prediction), references=references, by_answer=True)

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
        metrics |= result.metrics
        trainer.save_model()
        trainer.save_state()
    if training_args.do_eval:
        output = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
        metrics |= output.metrics
        if trainer.is_world_process_zero():
            path = Path(training_args.output_dir) / "predictions.jsonl"
            write_predictions(path, data["validation"], answers_of(output))
    by_answer = metrics.pop("eval_by_answer", {})
    for split in ("train", "eval"):
        part = {name: value for name, value in metrics.items() if name.startswith(split)}
        if part:
            trainer.log_metrics(split, part)
            trainer.save_metrics(split, {**part, **({"eval_by_answer": by_answer} if split == "eval" else {})})
    for answer, row in list(by_answer.items())[:20]:
        print(f"  {answer:<20} {row['accuracy']:7.2%} of {row['count']}")
    return metrics


if __name__ == "__main__":
    main()
