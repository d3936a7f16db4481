"""The options of pre-training: model, data, trainer."""

from dataclasses import dataclass, field

from trips_examples.training.options import DataArguments
from trips_examples.training.retrieval_options import RetrievalModelArguments, RetrievalTrainingArguments


@dataclass
class PretrainingModelArguments(RetrievalModelArguments):
    """`RetrievalModelArguments` for a model with all objectives."""

    mlm_weight: float | None = field(
        default=None, metadata={"help": "Weight of masked language modelling; 0 turns it off, as the others."}
    )
    prefix_lm_weight: float | None = field(default=None, metadata={"help": "Weight of prefix language modelling."})

    def config_overrides(self) -> dict:
        names = ("mlm_weight", "prefix_lm_weight")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**super().config_overrides(), **given}


@dataclass
class PretrainingDataArguments(DataArguments):
    """`DataArguments` for pairs, which may also be a stream."""

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
    max_bad_share: float | None = field(
        default=None,
        metadata={
            "help": "Skip and count the pairs of a stream that cannot be used, and stop at a larger share of them. "
            "Default: 0.05 with --skip_bad_rows, else 0: the first one stops it."
        },
    )

    def __post_init__(self):
        if self.train_shards is not None and (self.train_file is not None or self.streaming):
            raise ValueError("--train_shards is a source of its own: leave --train_file and --streaming out.")
        if self.max_bad_share is None:
            self.max_bad_share = 0.05 if self.skip_bad_rows else 0.0
        if self.streaming and self.dataset_name is None:
            raise ValueError("--streaming streams a data set of the Hub: give --dataset_name.")

    @property
    def is_stream(self) -> bool:
        return self.train_shards is not None or self.streaming

    @property
    def is_embedded(self) -> bool:
        return not self.is_stream and super().is_embedded


@dataclass
class PretrainingArguments(RetrievalTrainingArguments):
    """`RetrievalTrainingArguments` with what pre-training adds."""

    num_train_epochs: float = field(default=3.0, metadata={"help": "How often to train on each caption."})
    rerank_k: int = field(
        default=0,
        metadata={"help": "How many candidates of each query are matched and ranked again in evaluation. 0: none."},
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the words that are masked."})
    momentum_teacher: bool = field(
        default=True, metadata={"help": "Whether a momentum teacher softens targets and fills the queues."}
    )
    momentum: float = field(default=0.995, metadata={"help": "Share of the teacher that stays in each step."})
    queue_size: int | None = field(
        default=None,
        metadata={
            "help": "How many features of past images, and of past texts, of all processes stay as candidates. "
            "Default: 65,536, or a tenth of the training captions if that is less."
        },
    )
    teacher_weight: float = field(
        default=0.4, metadata={"help": "Share of the teacher in the targets, after it was ramped up from 0."}
    )
    teacher_ramp_steps: int | None = field(
        default=None,
        metadata={"help": "Steps of that ramp. Default: those of an epoch; of a stream, a 30th of all."},
    )
    teacher_start_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps before the teacher takes part, and contrast is within the batch. Features that are new "
            "every few steps cannot wait in a queue: a model tells the queue's from the batch's by their age alone, "
            "and learns nothing. Default: 0 for a model that starts from trained weights, else as teacher_ramp_steps."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("mlm_probability", "momentum", "teacher_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must be in [0, 1], got {getattr(self, name)}.")
