"""The options that the scripts share, one dataclass per subject."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from datasets import DatasetDict
from transformers import Seq2SeqTrainingArguments

from modeling_trips import TripsConfig
from trips_examples.data.rows import column_of
from trips_examples.data.scenes import DEFAULT_GRID, TILE_SIZE
from trips_examples.data.source import EMBEDDED_DATASETS, DataSource
from trips_examples.data.vocabulary import EMBEDDED_WORDS
from trips_examples.training.selection_teacher import SelectionTeacher


@dataclass
class ModelArguments:
    """What the model is made from, and how it selects patches."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A TRIPS checkpoint of any task to start from, with its processor; weights of this task that it "
            "lacks start at random, and are reported. Default: from scratch."
        },
    )
    vision_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A ViT, DeiT, CLIP or DINOv2 to start the vision tower from. Goes with the next one."},
    )
    text_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A BERT, MiniLM or RoBERTa to start the text encoder, the fusion and the decoder from."},
    )
    num_fusion_layers: int | None = field(
        default=None,
        metadata={"help": "Fusion layers of a model of these two. Default: the text encoder's upper half, or 6 new."},
    )
    freeze_vision_layers: int | None = field(
        default=None,
        metadata={
            "help": "Leave the patch embedding and so many of the vision tower's lowest layers as they are: what lies "
            "below the first layer that is trained costs no backward pass. Default: all is trained."
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
    selection_mode: str | None = field(
        default=None,
        metadata={
            "help": "How many tokens are kept: topk (the keep rate, the default) or mass (as few as have the share "
            "--selection_mass of the scores; the keep rate is the most)."
        },
    )
    selection_mass: list[float] | None = field(
        default=None, metadata={"help": "Sum of the scores that mass keeps, in (0, 1]: one, or one per layer."}
    )
    min_keep_rate: list[float] | None = field(
        default=None, metadata={"help": "Least share of the tokens that mass keeps: one rate, or one per layer."}
    )
    selection_guidance: list[str] | None = field(
        default=None,
        metadata={"help": "What selects: text, image or random; one, or one per selection layer, as in image text."},
    )
    selection_loss_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the loss that teaches texts to choose their patches, where the data say what a text is "
            "about. Default: the model's, 0.5. 0: the choice is learnt through the fused token alone."
        },
    )
    pointing_loss_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the loss that teaches where to look: the head of boxes at the patches of the box, a "
            "question at those of its region, where the data know it (and no --selection_teacher stands in). Other "
            "tasks do not use it. Default: the model's, 0. 2 helps much with real pictures of many names."
        },
    )
    selection_teacher: str | None = field(
        default=None,
        metadata={
            "help": "A TRIPS checkpoint that, unpruned, shows the texts where to look, for data that do not say what "
            "a text is about; start: the one that the run starts from. A forward pass more per step. Default: none."
        },
    )
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
        if (self.vision_model_name_or_path is None) != (self.text_model_name_or_path is None):
            raise ValueError("--vision_model_name_or_path and --text_model_name_or_path go together: give both.")
        if self.starts_from_parts and self.model_name_or_path is not None:
            raise ValueError("--model_name_or_path is a whole model: leave --vision_model_name_or_path out.")
        if self.num_fusion_layers is not None and not self.starts_from_parts:
            raise ValueError("--num_fusion_layers goes with --vision_model_name_or_path: leave it out.")

    @property
    def starts_from_parts(self) -> bool:
        return self.vision_model_name_or_path is not None

    @property
    def starts_from_weights(self) -> bool:
        return self.starts_from_parts or self.model_name_or_path is not None

    def config_overrides(self) -> dict:
        """The fields of `TripsConfig` that were given."""
        fields = {
            "selection_layers": self.selection_layers,
            "keep_rate": one_or_several(self.keep_rate),
            "selection_mode": self.selection_mode,
            "selection_mass": one_or_several(self.selection_mass),
            "min_keep_rate": one_or_several(self.min_keep_rate),
            "selection_guidance": one_or_several(self.selection_guidance),
            "selection_loss_weight": self.selection_loss_weight,
            "pointing_loss_coefficient": self.pointing_loss_coefficient,
            "fusion_type": self.fusion_type,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def make_selection_teacher(self, device: torch.device) -> SelectionTeacher | None:
        if self.selection_teacher is None:
            return None
        if self.selection_teacher != "start":
            return SelectionTeacher(self.selection_teacher, device)
        if self.model_name_or_path is None:
            raise ValueError("--selection_teacher start: the run starts from nothing. Give --model_name_or_path.")
        return SelectionTeacher(self.model_name_or_path, device)


def one_or_several(values: list | None):
    """What an option of one value, or one per selection layer, stands for."""
    return values[0] if values is not None and len(values) == 1 else values


@dataclass
class DataArguments(DataSource):
    """`DataSource`, and what becomes of the rows on their way to the model."""

    skip_bad_rows: bool = field(default=False, metadata={"help": "Skip and count unusable rows instead of stopping."})
    augment: bool | None = field(
        default=None,
        metadata={
            "help": "Random shifts of the images, and flips where texts do not say what is left. Default: for the "
            "embedded data only. Not for questions about picture_scenes, which ask for places."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows."})

    @property
    def is_embedded(self) -> bool:
        """Whether the data are made of easy-VQA's package, and not the user's."""
        no_file = self.train_file is None and self.validation_file is None
        return no_file and (self.dataset_name is None or self.dataset_name in EMBEDDED_DATASETS)

    def check(self, task: str):
        super().check(task)
        if self.augment and task == "vqa" and self.dataset_name == "picture_scenes":
            raise ValueError(
                "augment moves and flips, and questions about picture_scenes ask for places: leave it out."
            )

    @property
    def augments(self) -> bool:
        """What `augment` is, or its default."""
        return self.is_embedded if self.augment is None else self.augment

    def side_of_scenes(self, task: str) -> int | None:
        """Side of the scenes in pixels, or None where the data are no scenes."""
        if self.pictures is not None:
            return self.scene_size
        is_easy_vqa = self.dataset_name == "easy_vqa" or (self.dataset_name is None and task == "vqa")
        if not self.is_embedded or is_easy_vqa:
            return None
        return TILE_SIZE * (DEFAULT_GRID[task] if self.grid is None else self.grid)

    def half_scene_size(self, task: str) -> int | None:
        """At half their size easy-VQA's scenes still show colours and most shapes; a model is four times as fast."""
        side = self.side_of_scenes(task)
        return side if side is None or self.pictures is not None else side // 2

    def vocabulary(self, data: DatasetDict, *columns: str) -> Iterator[str]:
        """What a tokenizer is trained on: the texts in these columns, or for embedded data those of every task."""
        if self.is_embedded:
            yield from EMBEDDED_WORDS
            return
        dataset = data["train"] if "train" in data else data["validation"]
        for texts in chain.from_iterable(column_of(dataset, column) for column in columns):
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
    tower_learning_rate: list[float] | None = field(
        default=None, metadata={"help": "Peak learning rates of vision tower and text encoder: one or two values."}
    )
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
    logging_steps: float = field(
        default=0.05, metadata={"help": "How often to log the loss: steps, or below 1 their share of all steps."}
    )
    health_steps: float = field(
        default=0.25,
        metadata={
            "help": "How often to examine the selection, to log what it does and warn if it is not healthy: steps, or "
            "below 1 their share of all. 0: never."
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
        if self.max_steps == 0:
            raise ValueError("--max_steps must be positive, or -1 to train for --num_train_epochs, got 0.")
        if self.tower_learning_rate is not None and len(self.tower_learning_rate) > 2:
            raise ValueError(f"--tower_learning_rate takes one or two values, got {self.tower_learning_rate}.")
        if self.health_steps < 0:
            raise ValueError(f"--health_steps {self.health_steps}: must be at least 0, which is never.")
        if self.eval_steps is None and self.logging_steps < 1:
            self.eval_steps = self.save_steps  # an evaluation takes longer than a line of the log
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
