"""What the run_*.py scripts share: their options, data, model, trainer, and the order of a run."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from datasets import DatasetDict
from example_collators import ImageBatchCollator, ImageGroupedSampler, without_decoding
from example_datasets import EMBEDDED_DATASETS, load_task_dataset, train_wordpiece_tokenizer
from example_guard import LossGuard
from example_scenes import DEFAULT_GRID, TILE_SIZE
from torch.utils.data import Sampler
from transformers import (
    AutoTokenizer,
    BlipImageProcessor,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_trips import TripsConfig, TripsPreTrainedModel, TripsProcessor


logger = logging.getLogger(__name__)

# All words of easy-VQA and of scenes, of every task, and of the prompt of captions: models trained on any of them
# share a vocabulary, so that one can start from another.
EMBEDDED_WORDS = """
    a and at black blue both bottom brown circle color column contain does gray green has have image images in is left
    neither no not of one only or picture present rectangle red right row shape teal the there top triangle what yellow
    yes 1 2 3 4 5 6 7 8 , ?
""".split()


# Options


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A TRIPS checkpoint of any task to start from, with its processor; weights of this task that it "
            "lacks start at random, and are reported. Default: from scratch."
        },
    )
    preset: str = field(
        default="tiny", metadata={"help": f"Size of a model from scratch: one of {', '.join(TripsConfig.presets())}."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer of a model from scratch. Default: a WordPiece trained on the training texts."},
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width in pixels. Default: the model's, or that of the scenes."}
    )
    selection_layers: list[int] | None = field(
        default=None, metadata={"help": "ViT layers that select patches, numbered from 1: --selection_layers 5 10"}
    )
    keep_rate: list[float] | None = field(
        default=None, metadata={"help": "Share of the tokens kept: one rate, or one per layer. 1.0: no selection."}
    )
    selection_guidance: str | None = field(default=None, metadata={"help": "What selects: text, image or random."})
    fusion_type: str | None = field(
        default=None,
        metadata={
            "help": "How text and image meet: cross_attention (as in ALBEF), skip_connected (mPLUG) or single_stream "
            "(ViLT). Default: the checkpoint's; cross_attention from scratch."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "eager, sdpa, flash_attention_2. Default: sdpa; eager where there is no accelerator, since CPUs "
            "train small models fastest with it."
        },
    )

    def __post_init__(self):
        if self.attn_implementation is None and not torch.accelerator.is_available():
            self.attn_implementation = "eager"

    def config_overrides(self) -> dict:
        """The fields of `TripsConfig` that were given."""
        rate = self.keep_rate[0] if self.keep_rate is not None and len(self.keep_rate) == 1 else self.keep_rate
        fields = {
            "selection_layers": self.selection_layers,
            "keep_rate": rate,
            "selection_guidance": self.selection_guidance,
            "fusion_type": self.fusion_type,
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass
class SourceArguments:
    """Where the data of a task come from: what `load_task_dataset` asks for."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "easy_vqa (the default for questions), easy_vqa_scenes (the default for all else), or the name of "
            "a data set on the Hub."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "JSON, JSONL, CSV or Parquet with the columns that examples/README.md lists, or a public "
            "annotation file as it is."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "As train_file."})
    train_annotations: str | None = field(
        default=None, metadata={"help": "The second file of VQAv2 and RefCOCO. Default: that of the official name."}
    )
    validation_annotations: str | None = field(default=None, metadata={"help": "As train_annotations."})
    train_split: str | None = field(
        default=None, metadata={"help": "Of a file or Hub data set with several splits. Default: train."}
    )
    validation_split: str | None = field(
        default=None, metadata={"help": "As train_split. Default: val of a file, validation of the Hub."}
    )
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths are relative to."})
    grid: int | None = field(
        default=None, metadata={"help": "Tiles along each side of an easy_vqa_scenes image. Default: 2; NLVR2: 1."}
    )


@dataclass
class DataArguments(SourceArguments):
    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip and count unusable rows instead of stopping."})
    augment: bool | None = field(
        default=None,
        metadata={
            "help": "Random shifts of the images, and flips where texts do not say what is left. Default: for the "
            "embedded data only."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows."})

    @property
    def is_embedded(self) -> bool:
        """Whether the data are made of easy-VQA's package, and not the user's."""
        no_file = self.train_file is None and self.validation_file is None
        return no_file and (self.dataset_name is None or self.dataset_name in EMBEDDED_DATASETS)

    @property
    def augments(self) -> bool:
        """What `augment` is, or its default."""
        return self.is_embedded if self.augment is None else self.augment

    def scene_size(self, task: str) -> int | None:
        """Side of the scenes in pixels, or None where the data are no scenes."""
        is_easy_vqa = self.dataset_name == "easy_vqa" or (self.dataset_name is None and task == "vqa")
        if not self.is_embedded or is_easy_vqa:
            return None
        return TILE_SIZE * (DEFAULT_GRID[task] if self.grid is None else self.grid)

    def half_scene_size(self, task: str) -> int | None:
        """At half their size scenes still show colours and most shapes, and a model is four times as fast."""
        side = self.scene_size(task)
        return None if side is None else side // 2

    def vocabulary(self, data: DatasetDict, *columns: str) -> Iterator[str]:
        """What a tokenizer is trained on: the texts in these columns, or for embedded data those of every task."""
        if self.is_embedded:
            yield from EMBEDDED_WORDS
            return
        dataset = data["train"] if "train" in data else data["validation"]
        for texts in chain.from_iterable(dataset[column] for column in columns):
            yield from [texts] if isinstance(texts, str) else texts


@dataclass
class TripsTrainingArguments(Seq2SeqTrainingArguments):
    """
    `Seq2SeqTrainingArguments` whose defaults train the tiny preset from scratch on the embedded data. Fine-tuning a
    larger model wants a learning rate of about 2e-5 and fewer texts per batch.
    """

    output_dir: str | None = field(default="outputs", metadata={"help": "Folder of checkpoints and results."})
    do_train: bool = field(default=True, metadata={"help": "Whether to train."})
    do_eval: bool = field(default=True, metadata={"help": "Whether to evaluate at the end."})
    auto_bf16: bool = field(
        default=True,
        metadata={"help": "Train in bf16 mixed precision where the hardware is fast at it (unless --fp16 is given)."},
    )
    num_train_epochs: float = field(default=6.0, metadata={"help": "How often to train on each row."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Rows per device and step."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Rows per device in evaluation."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up; below 1, their share of all steps."})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's decay of the second moment."})
    weight_decay: float = field(default=0.05, metadata={"help": "Of weights; biases and norms have none."})
    texts_per_image: int = field(
        default=4,
        metadata={
            "aliases": ["--questions_per_image"],
            "help": "How many texts about an image may stand in a training batch; they share its computation.",
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collators need all columns."})
    predict_with_generate: bool = field(
        default=True,
        metadata={"help": "Evaluate models that write on what they write, not on the true text's scores."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Not needed: a loss that is NaN or infinite stops the run."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "How many checkpoints to keep."})

    def __post_init__(self):
        if self.label_smoothing_factor != 0.0:
            raise ValueError("--label_smoothing_factor: the losses of these models have no smoothing, leave it at 0.")
        if not self.predict_with_generate:
            raise ValueError("--predict_with_generate: these examples evaluate what the model writes, leave it on.")
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.auto_bf16 and not self.fp16:
            self.bf16 = self.bf16 or bf16_is_fast()
        super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """At most 1 per process: `nn.DataParallel` would part images from their texts. Use `accelerate launch`."""
        return min(super().n_gpu, 1)


def bf16_is_fast() -> bool:
    """Whether this machine's accelerator, or else its CPU, multiplies bfloat16 matrices in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older releases cannot tell
    return capabilities.get("avx512_bf16", False)


def parse_arguments(argv: list[str] | None, *classes: type, description: str) -> tuple[Any, ...]:
    """
    The options of a script, one object per class; `TripsTrainingArguments` or a subclass has to be the last class.
    Also sets up logging, where one process speaks for all, and the seed.
    """
    parser = HfArgumentParser(classes, description=description)
    arguments = parser.parse_args_into_dataclasses(args=argv)
    training_args = arguments[-1]
    level = logging.INFO if training_args.should_log else logging.WARNING
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level)
    transformers.utils.logging.set_verbosity_warning()
    set_seed(training_args.seed)
    if training_args.do_train:
        checkpoint_to_resume(training_args)  # raises before any data are read
    return arguments


# Data and model


def load_data(task: str, args: DataArguments, training_args: TripsTrainingArguments) -> DatasetDict:
    """
    The splits of a task (see `example_datasets`), as short as asked for, with images left encoded for the collators.

    Raises:
        ValueError: if there are bad rows, or no split to train or evaluate on as asked.
    """
    data = load_task_dataset(
        task,
        args.dataset_name,
        args.dataset_config_name,
        train_file=args.train_file,
        validation_file=args.validation_file,
        train_annotations=args.train_annotations,
        validation_annotations=args.validation_annotations,
        train_split=args.train_split,
        validation_split=args.validation_split,
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
    if "validation" in data and "image_id" in data["validation"].column_names:
        data["validation"] = data["validation"].sort("image_id")  # rows of one image share its computation
    return DatasetDict({split: without_decoding(dataset) for split, dataset in data.items()})


def load_model(
    model_class: type[TripsPreTrainedModel],
    args: ModelArguments,
    texts: Iterable[str],
    image_size: int | None = None,
    **config_fields,
) -> tuple[TripsPreTrainedModel, TripsProcessor]:
    """
    A checkpoint and its processor, or a model from scratch with a tokenizer to go with it.

    Args:
        model_class (`type[TripsPreTrainedModel]`): the task's.
        args (`ModelArguments`)
        texts (`Iterable[str]`): what a tokenizer is trained on, if there is none. Not read otherwise.
        image_size (`int`, *optional*): side in pixels that images get where `args` has no other.
        config_fields: fields of `TripsConfig` that the task fixes.
    """
    if args.image_size is None:
        args = replace(args, image_size=image_size)
    if args.model_name_or_path is not None:
        model, processor = _load_checkpoint(model_class, args, config_fields)
    else:
        model, processor = _make_model(model_class, args, texts, config_fields)
    logger.info("%s parameters, %s", f"{model.num_parameters():,}", model.config.vision_config.selection_schedule)
    return model, processor


def _load_checkpoint(model_class, args: ModelArguments, config_fields: dict):
    model = model_class.from_pretrained(
        args.model_name_or_path,
        attn_implementation=args.attn_implementation,
        **args.config_overrides(),
        **config_fields,
    )
    processor = TripsProcessor.from_pretrained(args.model_name_or_path)
    if args.image_size is not None:
        side = {"height": args.image_size, "width": args.image_size}
        processor.image_processor.size = side
        if getattr(processor.image_processor, "do_center_crop", False):  # as CLIP's do: of the whole image, then
            processor.image_processor.crop_size = dict(side)
    return model, processor


def _make_model(model_class, args: ModelArguments, texts: Iterable[str], config_fields: dict):
    if args.tokenizer_name is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
    else:
        tokenizer = train_wordpiece_tokenizer(texts)
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
        **config_fields,
    )
    model = model_class._from_config(config, attn_implementation=args.attn_implementation)
    return model, make_processor(tokenizer, config)


def make_processor(tokenizer: PreTrainedTokenizerBase, config: TripsConfig) -> TripsProcessor:
    """A processor for a model from scratch: images are resized to the model's size, with CLIP's mean and deviation."""
    size, patch_size = config.vision_config.image_size, config.vision_config.patch_size
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    image_processor = BlipImageProcessor(size={"height": size, "width": size})
    return TripsProcessor(image_processor, tokenizer, patch_size=patch_size)


# Training and evaluation


class SamplerCallback(TrainerCallback):
    """Tells the sampler the epoch. Accelerate does not in the epoch that several processes resume in the middle of."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))


class ImageGroupedTrainer(Seq2SeqTrainer):
    """
    `Seq2SeqTrainer` that draws the texts about an image together, collates training and evaluation apart, stops at a
    loss that is NaN or infinite ([`LossGuard`]), and evaluates each row once, whether the model writes or not.
    Parameters that get no gradient are frozen, so that data parallel training need not look for them.

    Args:
        train_collator ([`ImageBatchCollator`]): makes the batches of training; `data_collator` those of evaluation.
        args, kwargs: as in `Seq2SeqTrainer`.
    """

    def __init__(self, *args, train_collator: ImageBatchCollator, **kwargs):
        super().__init__(*args, **kwargs)
        self.train_collator, self.train_sampler = train_collator, None
        for parameter in self.model.unused_parameters():
            parameter.requires_grad_(False)
        self.add_callback(SamplerCallback(self))
        self.loss_guard = LossGuard(self.accelerator, self.args.output_dir)

    def _get_train_sampler(self, train_dataset=None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if "image_id" in dataset.column_names:
            image_ids = dataset["image_id"]
        else:  # several images per row: grouped with the rows about the same ones
            image_ids = [tuple(ids) for ids in dataset["image_ids"]]
        self.train_sampler = ImageGroupedSampler(image_ids, self.args.texts_per_image, self.args.seed)
        return self.train_sampler

    def get_train_dataloader(self):
        evaluation_collator, self.data_collator = self.data_collator, self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = evaluation_collator

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        self.loss_guard.check()
        return output

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        sources = inputs.pop("sources", [])
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.loss_guard.watch(loss, self.state.global_step + 1, sources)
        return loss

    def _save_checkpoint(self, model, trial):
        self.loss_guard.check()
        super()._save_checkpoint(model, trial)

    def evaluation_loop(self, *args, **kwargs):
        # `Seq2SeqTrainer` would keep the rows that fill up the last batch of several processes.
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        inputs.pop("sources", None)
        if self.model.can_generate():
            result = super().prediction_step(model, inputs, *args, **kwargs)
            self.model.generation_config.max_length = None  # it was set beside `max_new_tokens`, which warns
            return result
        return Trainer.prediction_step(self, model, inputs, *args, **kwargs)


def checkpoint_to_resume(args: TripsTrainingArguments) -> str | None:
    """
    The folder that `--resume_from_checkpoint` means: a path, or `last` for the latest in `output_dir` that is whole,
    since a run may have been killed while it wrote one. The trainer's state is what is written last.

    Raises:
        ValueError: `last`, and there is none; or nothing to resume is given, and there are checkpoints, which would be
            taken for those of the new run.
    """
    folders = [path.parent for path in Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    if args.resume_from_checkpoint is None and folders:
        raise ValueError(
            f"{args.output_dir} holds checkpoints: go on from them with --resume_from_checkpoint last, or choose "
            "another --output_dir."
        )
    if args.resume_from_checkpoint != "last":
        return args.resume_from_checkpoint
    if not folders:
        raise ValueError(f"--resume_from_checkpoint last: there is no checkpoint in {args.output_dir}.")
    return str(max(folders, key=lambda folder: int(folder.name.rpartition("-")[2])))


def train_and_evaluate(trainer: Trainer, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    """
    What a script does with its trainer: train (or resume), save, evaluate, as `do_train` and `do_eval` say. Metrics
    are printed, and written to `train_results.json`, `eval_results.json` and `all_results.json`.

    Args:
        trainer (`Trainer`)
        evaluate (`Callable[[], dict[str, float]]`): called in every process; returns the metrics of the evaluation.

    Returns:
        `dict[str, float]`: the metrics of both.
    """
    metrics = {}
    if trainer.args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.args))
        trainer.save_model()
        trainer.save_state()
        _report(trainer, "train", result.metrics)
        metrics |= result.metrics
    if trainer.args.do_eval:
        evaluation = evaluate()
        _report(trainer, "eval", evaluation)
        metrics |= evaluation
    return metrics


def _report(trainer: Trainer, split: str, metrics: dict[str, float]):
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


def end_processes():
    """The last words of a script: processes wait for each other and part. Gloo can abort one that just exits."""
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def write_whole(path: str | Path, text: str):
    """Writes a file under another name first, so that no part of it ever stands under its own; makes its folder."""
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
