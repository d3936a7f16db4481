"""What pre-training starts with: pairs, as splits or as a stream, and a model with its processor."""

import copy
from collections.abc import Sequence
from dataclasses import replace

from datasets import DatasetDict

from modeling_trips import TripsForPreTraining, TripsProcessor
from trips_examples.data.shards import find_shards, hub_shards
from trips_examples.data.streams import PairStream, Shard
from trips_examples.training.models import ModelStart
from trips_examples.training.pretraining_options import (
    PretrainingArguments,
    PretrainingDataArguments,
    PretrainingModelArguments,
)
from trips_examples.training.runs import load_data


OBJECTIVES = ("itc_weight", "itm_weight", "mlm_weight", "prefix_lm_weight")


def load_pairs(
    args: PretrainingDataArguments,
    training_args: PretrainingArguments,
    patch_size: int,
    processor: TripsProcessor | None,
) -> tuple[DatasetDict, PairStream | None]:
    """
    The splits that are loaded, and the stream in place of the training split, if there is one. A stream leaves out
    images and captions that do not fit the processor.
    """
    if not args.is_stream:
        return load_data("captions", args, training_args, patch_size), None
    if training_args.do_train and training_args.max_steps <= 0:
        raise ValueError("A stream has no end: say with --max_steps how long to train.")
    if training_args.do_eval and args.validation_file is None:
        raise ValueError("There is nothing to evaluate on: give --validation_file, or turn --do_eval off.")
    stream = open_stream(args, training_args, processor)
    if args.validation_file is None:
        return DatasetDict(), stream
    evaluation_args = copy.copy(training_args)
    evaluation_args.do_train = False
    files = replace(args, dataset_name=None, dataset_config_name=None, streaming=False, train_shards=None)
    return load_data("captions", files, evaluation_args, patch_size), stream


def open_stream(
    args: PretrainingDataArguments,
    training_args: PretrainingArguments,
    processor: TripsProcessor | None,
) -> PairStream:
    """The part of this process in the stream of shards, files or a data set on the Hub."""
    if args.train_shards is not None:
        shards: Sequence[Shard] = find_shards(args.train_shards, args.image_root)
    else:
        shards = hub_shards(args.dataset_name, args.dataset_config_name, args.train_split or "train")
    if processor is None:
        raise ValueError("A stream has no end to train a tokenizer on: give --tokenizer_name.")
    return PairStream(
        shards,
        seed=training_args.seed,
        buffer_size=args.shuffle_buffer,
        process_index=training_args.process_index,
        num_processes=training_args.world_size,
        image_column=args.image_column,
        caption_column=args.caption_column,
        processor=processor,
        max_bad_share=args.max_bad_share,
        log_folder=training_args.output_dir,
    )


class PretrainingStart(ModelStart):
    """[`ModelStart`] of a model with an objective."""

    def __init__(self, args: PretrainingModelArguments, image_size: int | None = None):
        super().__init__(TripsForPreTraining, args, image_size)
        if all(getattr(self.config, name) == 0 for name in OBJECTIVES):
            raise ValueError(f"There is nothing to learn: give one of {', '.join(OBJECTIVES)} a weight.")
