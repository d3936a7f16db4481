"""
Options of the scripts, and their command lines: [`ModelArguments`], [`DataArguments`] and [`TrainingOptions`] for all
trainings, and further classes for some. They are read before a script imports what takes seconds, so this module
imports nothing of it.
"""

import os
import sys
import traceback
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import MISSING, dataclass, replace

from huggingface_hub.errors import StrictDataclassError
from transformers.hf_argparser import HfArgumentParser

from trips_examples.data.printing import visible
from trips_examples.data.source import DataArguments, option
from trips_examples.training.checks import check_names, check_output, check_schedule
from trips_examples.training.recipe import SCHEDULES, recipe


# Options that are fields of `TripsConfig`.
CONFIG_FIELDS = {
    "schedule",
    "selection_loss_weight",
    "attention_loss_weight",
    "fusion_type",
    "itc_weight",
    "itm_weight",
    "mlm_weight",
    "prefix_lm_weight",
}
SCHEDULE_HELP = "Layers that select patches, scorer, share kept: 6:image:0.5,9:text:0.5. Or: unpruned."
# Options for experiments. Only `--help_all` shows them.
RARE = {
    "num_fusion_layers",
    "freeze_vision_layers",
    "tokenizer",
    "max_image_size",
    "selection_loss_weight",
    "learns_relevance",
    "fusion_type",
    "dataset_config_name",
    "grid",
    "train_scenes",
    "validation_scenes",
    "test_scenes",
    "do_eval",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta2",
    "logging_steps",
    "save_total_limit",
    "relevance_share",
}


@dataclass
class ModelArguments:
    """Options of the initial weights and of the patch selection."""

    _argument_group_name = "model and selection"

    model: str | None = option(None, "TRIPS checkpoint. Default: pretrained towers for own data, else from scratch.")
    vision_model_name_or_path: str | None = option(None, "ViT, DeiT, CLIP or DINOv2; also needs a text model.")
    text_model_name_or_path: str | None = option(None, "BERT, MiniLM or RoBERTa for text, fusion and decoder.")
    num_fusion_layers: int | None = option(None, "Fusion layers. Default: half of the text encoder, or 6 new.")
    freeze_vision_layers: int | None = option(None, "Freeze the patch embedding and the first N vision layers.")
    preset: str | None = option(None, "Size of a model from scratch: tiny (the default), small or base.")
    tokenizer: str | None = option(None, "Tokenizer of a model from scratch. Default: trained on the training texts.")
    image_size: int | None = option(None, "Height and width in pixels. Default: the checkpoint's, or the scenes'.")
    max_image_size: int | None = option(None, "In place of --image_size: that of the images, at most this.")
    schedule: str | None = option(None, SCHEDULE_HELP)
    selection_loss_weight: float | None = option(None, "Weight of selection supervision by regions.")
    fusion_type: str | None = option(None, "cross_attention, skip_connected (mPLUG) or single_stream (ViLT).")

    def __post_init__(self):
        if (self.vision_model_name_or_path is None) != (self.text_model_name_or_path is None):
            raise ValueError("--vision_model_name_or_path and --text_model_name_or_path must be given together.")
        if self.starts_from_parts and self.model is not None:
            raise ValueError("--model and --vision_model_name_or_path exclude each other. Give one.")
        if self.num_fusion_layers is not None and not self.starts_from_parts:
            raise ValueError("--num_fusion_layers needs --vision_model_name_or_path.")
        if self.schedule not in (None, *SCHEDULES.values()):  # of the recipe
            check_schedule(self.schedule)

    @property
    def starts_from_parts(self) -> bool:
        return self.vision_model_name_or_path is not None

    @property
    def start(self) -> str:
        """The initial weights in words."""
        if self.starts_from_parts:
            return f"{self.vision_model_name_or_path} and {self.text_model_name_or_path}"
        return self.model or f"{self.preset or 'tiny'} from scratch"


def config_fields(arguments) -> dict:
    """Return the fields of `TripsConfig` that the given options set."""
    return {name: value for name, value in vars(arguments).items() if name in CONFIG_FIELDS and value is not None}


@dataclass
class RunOptions:
    """
    The options of `TrainingArguments` that most runs need. The defaults train the tiny preset on the bundled data;
    [`recipe`] has those of runs on own data. A script accepts all options of `TrainingArguments`: [`parse_arguments`]
    turns these into [`RunArguments`].
    """

    _argument_group_name = "training"

    output_dir: str | None = option("outputs", "Folder of checkpoints and results.")
    do_train: bool = option(True, "Train the model.")
    do_eval: bool = option(True, "Evaluate at the end.")
    do_predict: bool = option(True, "Evaluate on the test split, if any.")
    num_train_epochs: float = option(6.0, "Number of training epochs.")
    max_steps: int = option(-1, "Number of steps in place of --num_train_epochs.")
    per_device_train_batch_size: int = option(256, "Texts per device and training step.")
    per_device_eval_batch_size: int = option(128, "Rows per device in evaluation.")
    gradient_accumulation_steps: int = option(1, "Batches per step.")
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = option("warmup_stable_decay", "Learning rate schedule. This one falls while pruned.")
    warmup_steps: float = option(0.1, "Warm-up steps; below 1, their share of all steps.")
    weight_decay: float = option(0.05, "Weight decay, except for biases and norms.")
    bf16: bool | None = option(False, "Train in bf16 mixed precision. On own data: if the device has it.")
    seed: int = option(42, "Seed of weights, order of the rows, and draws.")
    logging_steps: float = option(0.05, "Log every N steps; below 1, a share of all steps.")
    save_steps: float = option(500, "Save a checkpoint every N steps.")
    save_total_limit: int | None = option(2, "Number of checkpoints to keep.")
    resume_from_checkpoint: str | None = option(None, "A checkpoint, or last: the latest whole one of --output_dir.")
    overwrite_output_dir: bool = option(False, "Replace a model in --output_dir that another run wrote.")

    def __post_init__(self):
        if self.max_steps == 0:
            raise ValueError("--max_steps must be positive, or -1 for --num_train_epochs, got 0.")
        if self.max_steps < 0 and self.num_train_epochs <= 0:
            raise ValueError(f"--num_train_epochs must be positive, got {self.num_train_epochs}.")
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in (*sizes, "save_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive, got {getattr(self, name)}.")

    def check_files(self):
        """Check the output folder and the checkpoint to resume from, see `check_output`."""
        if self.do_train:
            check_output(self.output_dir, self.resume_from_checkpoint, self.overwrite_output_dir)


@dataclass
class TrainingOptions(RunOptions):
    """Options of the training of a TRIPS model, which [`parse_arguments`] turns into [`TripsTrainingArguments`]."""

    tower_learning_rate: list[float] | None = option(None, "Peak rate of both towers, or of vision and text.")
    adam_beta2: float = option(0.98, "AdamW's decay of the second moment.")
    texts_per_image: int = option(4, "Texts of an image that may share a training batch.")
    unpruned_share: float = option(0.0, "Share of unpruned first steps. With --model and --schedule: 0.125.")
    relevance_share: float = option(0.0, "Share of the unpruned steps, the last, in which scores learn relevance.")
    learns_relevance: bool = option(False, "Pruned steps teach the scores relevance, too.")
    keep_rates: list[float] = option([], "Rates of which each pruned step draws one: a model for all of them.")

    def __post_init__(self):
        super().__post_init__()
        if self.texts_per_image < 1:
            raise ValueError(f"--texts_per_image must be positive, got {self.texts_per_image}.")
        if not 0 <= self.unpruned_share < 1:
            raise ValueError(f"--unpruned_share must be in [0, 1), got {self.unpruned_share}.")
        if not 0 <= self.relevance_share <= 1:
            raise ValueError(f"--relevance_share must be in [0, 1], got {self.relevance_share}.")
        for keep_rate in self.keep_rates:
            if not 0 < keep_rate <= 1:
                raise ValueError(f"--keep_rates must be in (0, 1], got {keep_rate}.")
        if self.tower_learning_rate is not None and len(self.tower_learning_rate) > 2:
            raise ValueError(f"--tower_learning_rate takes one or two values, got {self.tower_learning_rate}.")


@dataclass
class CaptioningArguments:
    """Options of run_captioning.py."""

    _argument_group_name = "captions"

    prompt: str = option("a picture of ", "Text that the image is pruned and fused with.")
    length_penalty: float = option(1.0, "Of beam search: above 0 prefers long captions, below 0 short ones.")
    no_repeat_ngram_size: int = option(0, "Forbid repeated n-grams of this size (0 disables).")


@dataclass
class GroundingArguments:
    """Options of run_grounding.py."""

    _argument_group_name = "boxes"

    attention_loss_weight: float | None = option(None, "Weight of attention supervision by the boxes. Default: 0.")


@dataclass
class RetrievalArguments:
    """Options of run_retrieval.py: losses, and reranking in evaluation."""

    _argument_group_name = "retrieval"

    itc_weight: float | None = option(None, "Weight of the contrastive loss. Default: 1.")
    itm_weight: float | None = option(None, "Weight of the matching loss. Default: 1.")
    rerank_k: int = option(16, "Candidates of a query that are ranked again. 0: none.")


@dataclass
class PretrainingArguments(RetrievalArguments):
    """Options of run_pretraining.py: objectives, momentum teacher, streams, and reranking in evaluation."""

    _argument_group_name = "pre-training"

    mlm_weight: float | None = option(None, "Weight of masked language modeling.")
    prefix_lm_weight: float | None = option(None, "Weight of prefix language modeling.")
    rerank_k: int = option(0, "Candidates of a query that are ranked again. 0: none.")
    momentum_teacher: bool = option(True, "Train with a momentum teacher and its queues.")
    queue_size: int | None = option(None, "Queued features. Default: a tenth of the captions, at most 65536.")
    teacher_start_steps: int | None = option(None, "Steps without it. Default: 0 from a checkpoint, else an epoch.")


@dataclass
class PairArguments(DataArguments):
    """Options of the data of run_pretraining.py, which may be streamed."""

    train_shards: list[str] | None = option(None, "Streamed tar, JSONL, JSON, CSV or Parquet: cc3m-{000..331}.tar.")
    streaming: bool = option(False, "Stream --dataset_name from the Hub.")
    shuffle_buffer: int = option(1000, "Pairs of a stream to shuffle at a time per worker.")
    max_bad_share: float | None = option(None, "Bad pairs to skip. Default: 0.05 with --skip_bad_rows, else 0.")

    @property
    def is_stream(self) -> bool:
        return self.train_shards is not None or self.streaming

    @property
    def is_bundled(self) -> bool:
        return not self.is_stream and super().is_bundled

    @property
    def without_stream(self) -> "PairArguments":
        """The options of the files beside a stream."""
        return replace(self, dataset_name=None, train_split=None, train_shards=None, streaming=False)

    def check_files(self):
        if not self.is_stream:
            super().check_files()
            return
        rest = self.without_stream
        rest.image_root = rest.image_root if rest.files else None  # else that of the shards
        rest.check_files()
        unread = set(self.own_columns) - {"image", "caption"}
        if unread:
            raise ValueError(f"A stream has images and captions: --columns {', '.join(sorted(unread))} is not read.")
        if self.max_train_samples is not None:
            raise ValueError("--max_train_samples does not shorten a stream. Give --max_steps.")


# Options of a task, and defaults of its runs on bundled scenes and from scratch in place of [`TrainingOptions`]'.
TASK_OPTIONS: dict[str, tuple[list[type], dict]] = {
    "vqa": ([], {}),
    "captioning": ([CaptioningArguments], {}),
    "grounding": (
        [GroundingArguments],
        {"num_train_epochs": 5.0, "per_device_train_batch_size": 64, "learning_rate": 5e-4},
    ),
    "nlvr2": (
        [],
        {"num_train_epochs": 10.0, "per_device_train_batch_size": 64, "learning_rate": 5e-4},
    ),
    "retrieval": (
        [RetrievalArguments],
        {"num_train_epochs": 5.0, "per_device_train_batch_size": 48, "texts_per_image": 1},
    ),
    "pretraining": (
        [PretrainingArguments],
        {"num_train_epochs": 3.0, "per_device_train_batch_size": 48, "texts_per_image": 1},
    ),
}


# Command lines


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Formatter that keeps the line breaks of the docstring and lists an option once, with `_`."""

    def _format_action_invocation(self, action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        values = "" if action.nargs == 0 else f" {self._format_args(action, action.dest.upper())}"
        return ", ".join(names) + values

    def _get_help_string(self, action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """
    Parser of the options in dataclasses, which guesses no abbreviated ones. With [`RunOptions`] among them, the script
    also takes the options of Transformers' `TrainingArguments`, which `parse_arguments` reads. `task` names the
    [`recipe`] that sets the defaults of runs on own data, with `on_cpu` those of runs without an accelerator;
    `defaults` override those of the classes.
    """

    def __init__(self, *classes: type, description: str, task: str | None = None, on_cpu: bool = False, **defaults):
        layout = {"usage": "%(prog)s [options]", "formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(classes, description=description.strip(), **layout)
        self.classes = classes
        self.task = task
        self.on_cpu = on_cpu
        self.defaults = defaults
        self.typed: set[str] = set()  # the options of the last command line
        self.trains = any(issubclass(each, RunOptions) for each in classes)
        self.set_defaults(**defaults)
        of_recipe = recipe(task, {"train_file": None})
        of_recipe_on_cpu = recipe(task, {"train_file": None}, on_cpu=True)
        is_whole = {RunOptions, TrainingOptions}.isdisjoint(classes)  # with the options of Transformers' `Trainer`
        for action in self._actions:
            value = of_recipe.get(action.dest)
            if value is not None:
                value_on_cpu = of_recipe_on_cpu[action.dest]
                action.help += f" On own data, without a start: {value}"
                action.help += "." if value_on_cpu == value else f", on a CPU {value_on_cpu}."
            is_negation = action.const is False  # --no_do_train beside --do_train
            if is_negation or (action.dest in RARE and not is_whole):
                action.help = SUPPRESS
        if self.trains:
            self.add_argument("--help_all", action="help", help="Show the options for experiments and Trainer's, too.")

    def check(self):
        """
        End the process at `--help`, or with a message if options have wrong values or name files that do not exist.
        Scripts call it before the imports that take seconds. Only `parse_arguments` knows the values of the options of
        Transformers' `Trainer`.
        """
        if self.trains and "--help_all" in sys.argv:
            return
        try:
            check_launch()
            arguments = self.parse_args_into_dataclasses(return_remaining_strings=self.trains)
            for each in arguments:
                if hasattr(each, "check_files"):
                    each.check_files()
            for each in arguments:
                if self.trains or not isinstance(each, ModelArguments):  # check_data.py does without a start
                    check_names(each)
        except (ValueError, OSError) as error:
            self.error(str(error))

    def error(self, message: str):
        """End the process with status 2 and one line."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args=None, namespace=None) -> tuple[Namespace, list[str]]:
        if namespace is None:
            own = {action.dest for action in self._actions}
            blank = Namespace(**dict.fromkeys(own, MISSING))
            parsed, _ = super().parse_known_args(args, blank)
            typed = {name: value for name, value in vars(parsed).items() if value is not MISSING}
            self.typed = set(typed)
            on_cpu = self.on_cpu or typed.get("use_cpu", False)
            namespace = Namespace()
            for name, value in recipe(self.task, typed, on_cpu).items():
                if name in own:
                    setattr(namespace, name, value)
        return super().parse_known_args(args, namespace)


def make_parser(*classes: type, description: str, script: str = "", **options) -> Parser:
    """
    Return a [`Parser`] with these `options`. A script gives its `__name__`: if it is run, its command line is checked
    at once, before it imports what takes seconds.
    """
    parser = Parser(*classes, description=description, **options)
    if script == "__main__":
        parser.check()
    return parser


def task_parser(task: str, description: str, script: str) -> Parser:
    """Return the parser of `run_{task}.py`: options of the model, of the task, of the data and of the training."""
    own, defaults = TASK_OPTIONS[task]
    data = PairArguments if task == "pretraining" else DataArguments
    with_recipe = task if task in SCHEDULES else None
    classes = [ModelArguments, *own, data, TrainingOptions]
    return make_parser(*classes, description=description, script=script, task=with_recipe, **defaults)


def check_launch():
    """
    Raise a `ValueError` in the single process that `accelerate launch --num_processes 2` starts on a machine without
    GPUs. Only the address of the processes that do not exist tells it from a launch of one.
    """
    was_launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    sizes = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}
    if was_launched and not sizes & os.environ.keys():
        raise ValueError(
            "`accelerate launch` started one process of several, as it does without GPUs. "
            f"Type torchrun --nproc_per_node 2 {sys.argv[0]} and the options of the script."
        )


# Packages that check or read what the user gives. A `ValueError` from another one, such as PyTorch, is a bug.
CHECKING = {"__main__", "modeling_trips", "trips_examples", "trips_serving"}
CHECKING |= {"transformers", "accelerate", "huggingface_hub", "datasets", "pyarrow", "json", "codecs"}


def is_of_input(error: Exception) -> bool:
    """Return whether an error tells the user about options, files or packages, and needs no traceback."""
    if isinstance(error, ValueError):
        *_, (innermost_frame, _) = traceback.walk_tb(error.__traceback__)
        package = innermost_frame.f_globals["__name__"].partition(".")[0]
        return package in CHECKING
    return isinstance(error, (OSError, ImportError, FloatingPointError, StrictDataclassError))


def run_script(main: Callable[[], object]):
    """
    Run the `main` of a script. Errors of the input or of files, and losses that are not finite end the process with
    status 1 and one line; `TRIPS_TRACEBACK=1` shows their traceback. Other exceptions keep theirs. At the end, the
    processes of a launch wait for each other.
    """
    try:
        main()
    except Exception as error:
        if os.environ.get("TRIPS_TRACEBACK", "0") != "0":
            raise
        if not is_of_input(error):
            raise
        is_wrapped = isinstance(error, StrictDataclassError) and error.__cause__ is not None
        message = str(error.__cause__ if is_wrapped else error)
        message = "\n".join(map(visible, message.splitlines()))
        sys.exit(f"error: {message} (TRIPS_TRACEBACK=1 shows the traceback.)")
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()  # gloo can abort processes that only exit
        distributed.destroy_process_group()
