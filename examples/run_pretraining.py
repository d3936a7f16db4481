"""
Pre-train TRIPS on pairs of image and caption: contrast (ITC), matching (ITM), masked words (MLM) and continuations
(PrefixLM), with a momentum teacher.

    accelerate launch examples/run_pretraining.py                  # scenes of easy-VQA, the tiny preset: on a laptop
    accelerate launch examples/run_pretraining.py --keep_rate 1.0 --output_dir unpruned  # its twin
    accelerate launch examples/run_pretraining.py --train_shards "cc3m-{000..331}.tar" "sbu-{00..82}.tar" \
        --validation_file coco_val.json --image_root coco --max_steps 234000 \
        --vision_model_name_or_path openai/clip-vit-base-patch16 --text_model_name_or_path bert-base-uncased \
        --image_size 256 --learning_rate 1e-4 --vision_learning_rate 1e-5 --weight_decay 0.02 \
        --per_device_train_batch_size 64 --dataloader_num_workers 8 --save_steps 2000

Pairs come from files, the Hub or the embedded scenes, as for the other tasks, or as a stream: of tar shards or files
(`--train_shards`), or of a data set on the Hub (`--dataset_name ... --streaming`). What it ends with, any other script
starts from (`--model_name_or_path`). See `--help` for all options.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from datasets import DatasetDict
from transformers import AutoImageProcessor, AutoTokenizer

from modeling_trips import TripsForPreTraining, TripsProcessor
from trips_examples.data.collators import without_long_texts
from trips_examples.data.pretraining import PretrainingCollator
from trips_examples.data.shards import find_shards, hub_shards
from trips_examples.data.streams import PairStream, Shard
from trips_examples.training.models import load_model, make_processor
from trips_examples.training.options import DataArguments
from trips_examples.training.pretraining import PretrainingArguments, PretrainingTrainer
from trips_examples.training.retrieval import RetrievalModelArguments
from trips_examples.training.runs import end_processes, load_data, parse_arguments, train_and_evaluate


OBJECTIVES = ("itc_weight", "itm_weight", "mlm_weight", "prefix_lm_weight")


@dataclass
class PretrainingModelArguments(RetrievalModelArguments):
    vision_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A ViT, DeiT or CLIP to start the vision tower from. Goes with the next one."},
    )
    text_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A BERT, MiniLM or RoBERTa to start the text encoder, the fusion and the decoder from."},
    )
    mlm_weight: float | None = field(
        default=None, metadata={"help": "Weight of masked language modelling; 0 turns it off, as the others."}
    )
    prefix_lm_weight: float | None = field(default=None, metadata={"help": "Weight of prefix language modelling."})
    honest_masking: bool | None = field(
        default=None,
        metadata={
            "help": "Whether masked captions and beginnings select patches for themselves, or look at those that the "
            "whole caption selects (the default: no worse in trials, and cheaper)."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if (self.vision_model_name_or_path is None) != (self.text_model_name_or_path is None):
            raise ValueError("--vision_model_name_or_path and --text_model_name_or_path go together: give both.")
        if self.starts_from_parts and self.model_name_or_path is not None:
            raise ValueError("--model_name_or_path is a whole model: leave --vision_model_name_or_path out.")

    @property
    def starts_from_parts(self) -> bool:
        return self.vision_model_name_or_path is not None

    @property
    def starts_from_weights(self) -> bool:
        return self.starts_from_parts or self.model_name_or_path is not None

    @property
    def needs_tokenizer(self) -> bool:
        """Whether a tokenizer has to be trained."""
        sources = (self.model_name_or_path, self.tokenizer_name, self.text_model_name_or_path)
        return all(source is None for source in sources)

    def config_overrides(self) -> dict:
        names = ("mlm_weight", "prefix_lm_weight", "honest_masking")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**super().config_overrides(), **given}


@dataclass
class PretrainingDataArguments(DataArguments):
    train_shards: list[str] | None = field(
        default=None,
        metadata={
            "help": "Pairs to stream: tar shards of WebDataset, or JSONL, JSON, CSV or Parquet files, as in "
            '"cc3m-{000..331}.tar" or "pairs/*.parquet". Needs --max_steps.'
        },
    )
    streaming: bool = field(default=False, metadata={"help": "Stream --dataset_name from the Hub. Needs --max_steps."})
    augment: bool = field(default=False, metadata={"help": "Random shifts of the images."})
    image_column: str | None = field(default=None, metadata={"help": "Column of a stream's images."})
    caption_column: str | None = field(default=None, metadata={"help": "Column of a stream's captions."})
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Pairs of a stream that are shuffled at a time, in each worker."}
    )
    max_bad_share: float = field(
        default=0.05, metadata={"help": "A stream stops at a larger share of pairs that cannot be used."}
    )

    def __post_init__(self):
        if self.train_shards is not None and (self.train_file is not None or self.streaming):
            raise ValueError("--train_shards is a source of its own: leave --train_file and --streaming out.")
        if self.streaming and self.dataset_name is None:
            raise ValueError("--streaming streams a data set of the Hub: give --dataset_name.")

    @property
    def is_stream(self) -> bool:
        return self.train_shards is not None or self.streaming

    @property
    def is_embedded(self) -> bool:
        return not self.is_stream and super().is_embedded


def load_pairs(
    args: PretrainingDataArguments, training_args: PretrainingArguments
) -> tuple[DatasetDict, PairStream | None]:
    """The splits that are loaded, and the stream in place of the training split, if there is one."""
    if not args.is_stream:
        return load_data("captions", args, training_args), None
    if training_args.do_train and training_args.max_steps <= 0:
        raise ValueError("A stream has no end: say with --max_steps how long to train.")
    if training_args.do_eval and args.validation_file is None:
        raise ValueError("There is nothing to evaluate on: give --validation_file, or turn --do_eval off.")
    if args.train_shards is not None:
        shards: Sequence[Shard] = find_shards(args.train_shards, args.image_root)
    else:
        shards = hub_shards(args.dataset_name, args.dataset_config_name, args.train_split or "train")
    stream = PairStream(
        shards,
        seed=training_args.seed,
        buffer_size=args.shuffle_buffer,
        process_index=training_args.process_index,
        num_processes=training_args.world_size,
        image_column=args.image_column,
        caption_column=args.caption_column,
        max_bad_share=args.max_bad_share,
        log_folder=training_args.output_dir,
    )
    if args.validation_file is None:
        return DatasetDict(), stream
    evaluation_args = copy.copy(training_args)
    evaluation_args.do_train = False
    files = replace(args, dataset_name=None, dataset_config_name=None, streaming=False, train_shards=None)
    return load_data("captions", files, evaluation_args), stream


def load_pretraining_model(
    args: PretrainingModelArguments, texts: Iterable[str], image_size: int | None = None
) -> tuple[TripsForPreTraining, TripsProcessor]:
    """A checkpoint, a model from a vision tower and a text encoder, or one from scratch; with its processor."""
    if args.starts_from_parts:
        model, processor = load_parts(args)
    else:
        model, processor = load_model(TripsForPreTraining, args, texts, image_size=image_size)
    if all(getattr(model.config, name) == 0 for name in OBJECTIVES):
        raise ValueError(f"There is nothing to learn: give one of {', '.join(OBJECTIVES)} a weight.")
    return model, processor


def load_parts(args: PretrainingModelArguments) -> tuple[TripsForPreTraining, TripsProcessor]:
    """Of a vision tower and a text encoder that were trained apart; pixels are normalised as the former's."""
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.text_model_name_or_path)
    model = TripsForPreTraining.from_vision_text_pretrained(
        args.vision_model_name_or_path,
        args.text_model_name_or_path,
        image_size=args.image_size,
        decoder_from_text=True,
        decoder_config={"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id},
        **args.config_overrides(),
    )
    if args.attn_implementation is not None:
        model.set_attn_implementation(args.attn_implementation)
    processor = make_processor(tokenizer, model.config)
    source = AutoImageProcessor.from_pretrained(args.vision_model_name_or_path)
    processor.image_processor.image_mean, processor.image_processor.image_std = source.image_mean, source.image_std
    return model, processor


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, training_args = parse_arguments(
        argv, PretrainingModelArguments, PretrainingDataArguments, PretrainingArguments, description=__doc__
    )
    data, stream = load_pairs(data_args, training_args)
    if stream is not None and model_args.needs_tokenizer:
        raise ValueError("A stream has no end to train a tokenizer on: give --tokenizer_name.")
    side = data_args.half_scene_size("captions")
    model, processor = load_pretraining_model(model_args, data_args.vocabulary(data, "caption"), side)
    data = without_long_texts(data, "caption", processor, skip=data_args.skip_bad_rows)
    if stream is not None:
        stream.tokenizer = processor.tokenizer  # captions that are too long are skipped
    make_collator = partial(
        PretrainingCollator,
        processor,
        mlm_probability=training_args.mlm_probability,
        masks_words=model.config.mlm_weight > 0,
        cuts_captions=model.config.prefix_lm_weight > 0,
        seed=training_args.seed,
    )
    if training_args.teacher_start_steps is None and model_args.starts_from_weights:
        training_args.teacher_start_steps = 0
    trainer = PretrainingTrainer(
        model=model,
        args=training_args,
        train_dataset=data.get("train") if stream is None else stream,
        eval_dataset=data.get("validation"),
        data_collator=make_collator(),
        train_collator=make_collator(training=True, augment=data_args.augment),
        processing_class=processor,
    )
    return train_and_evaluate(trainer, trainer.evaluate)


if __name__ == "__main__":
    main()
    end_processes()
