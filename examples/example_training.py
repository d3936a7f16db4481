"""What the run_*.py scripts share: training arguments, batches that share images, augmentation, model making."""

import io
import logging
import os
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import datasets
import PIL.Image
import torch
from torch.utils.data import Sampler
from torchvision.transforms.v2 import functional as F
from transformers import BlipImageProcessor, PreTrainedTokenizerBase, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from modeling_trips import TripsConfig, TripsProcessor, convert_to_rgb


logger = logging.getLogger(__name__)


@dataclass
class TripsTrainingArguments(Seq2SeqTrainingArguments):
    """
    `Seq2SeqTrainingArguments` whose defaults train the tiny preset from scratch on the embedded data. Fine-tuning a
    larger model wants a learning rate of about 2e-5 and fewer questions per batch.
    """

    output_dir: str | None = field(default="outputs", metadata={"help": "Folder of checkpoints and results."})
    do_train: bool = field(default=True, metadata={"help": "Whether to train."})
    do_eval: bool = field(default=True, metadata={"help": "Whether to evaluate at the end."})
    auto_bf16: bool = field(
        default=True,
        metadata={"help": "Train in bf16 mixed precision where the hardware is fast at it (unless --fp16 is given)."},
    )
    num_train_epochs: float = field(default=6.0, metadata={"help": "How often to train on each question."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Questions per device and step."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Questions per device in evaluation."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up; below 1, their share of all steps."})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's decay of the second moment."})
    weight_decay: float = field(default=0.05, metadata={"help": "Of weights; biases and norms have none."})
    questions_per_image: int = field(
        default=4,
        metadata={"help": "How many questions of an image may stand in a training batch; they share its computation."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collators need all columns."})
    predict_with_generate: bool = field(default=True, metadata={"help": "Evaluate on generated answers."})
    save_total_limit: int | None = field(default=2, metadata={"help": "How many checkpoints to keep."})

    def __post_init__(self):
        if self.label_smoothing_factor != 0.0:
            raise ValueError("--label_smoothing_factor: the loss of weighted answers has no smoothing, leave it at 0.")
        if not self.predict_with_generate:
            raise ValueError("--predict_with_generate: these examples evaluate what the model writes, leave it on.")
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.auto_bf16 and not self.fp16:
            self.bf16 = self.bf16 or bf16_is_fast()
        super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """At most 1 per process: `nn.DataParallel` would part images from their questions. Use `accelerate launch`."""
        return min(super().n_gpu, 1)


def bf16_is_fast() -> bool:
    """Whether this machine's accelerator, or else its CPU, multiplies bfloat16 matrices in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older releases cannot tell
    return capabilities.get("avx512_bf16", False)


def checkpoint_to_resume(args: TripsTrainingArguments) -> str | None:
    """The folder that `--resume_from_checkpoint` means: a path, or `last` for the latest in `output_dir`."""
    if args.resume_from_checkpoint != "last":
        return args.resume_from_checkpoint
    checkpoint = get_last_checkpoint(args.output_dir)
    if checkpoint is None:
        raise ValueError(f"--resume_from_checkpoint last: there is no checkpoint in {args.output_dir}.")
    return checkpoint


class ImageGroupedSampler(Sampler[int]):
    """
    Rows in random order, but up to `group_size` rows of one image next to each other, so that they share its prefix.

    Args:
        image_ids (`Sequence[str]`): the image of each row.
        group_size (`int`): how many rows of an image stay together. All rows are drawn once per epoch.
        seed (`int`): with the epoch it determines the order, in every process alike.
    """

    def __init__(self, image_ids: Sequence[str], group_size: int, seed: int = 0):
        self.group_size, self.seed, self.epoch = group_size, seed, 0
        rows_by_image = defaultdict(list)
        for row, image_id in enumerate(image_ids):
            rows_by_image[image_id].append(row)
        self.rows_by_image = list(rows_by_image.values())

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.rows_by_image))

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}-{self.epoch}")
        groups = []
        for rows in self.rows_by_image:
            rows = rng.sample(rows, len(rows))
            groups += [rows[start : start + self.group_size] for start in range(0, len(rows), self.group_size)]
        rng.shuffle(groups)
        return chain.from_iterable(groups)


class ImageGroupedTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` that draws the questions of an image together, and collates training and evaluation apart."""

    def __init__(self, *args, train_collator, **kwargs):
        super().__init__(*args, **kwargs)
        self.train_collator = train_collator

    def _get_train_sampler(self, train_dataset=None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return ImageGroupedSampler(dataset["image_id"], self.args.questions_per_image, self.args.seed)

    def get_train_dataloader(self):
        evaluation_collator, self.data_collator = self.data_collator, self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = evaluation_collator


@dataclass
class VqaCollator:
    """
    Rows of `example_datasets.VQA_FEATURES` -> inputs of [`TripsForQuestionAnswering`]. Each image comes once, however
    many rows ask about it (`image_index`).

    Args:
        processor (`TripsProcessor`)
        training (`bool`): all distinct answers of a question become labels, weighted by how many annotators gave them
            (`text_index`, `label_weights`), and images are augmented if `augment`. In evaluation the label is the
            most common answer.
        augment (`bool`): random flips and shifts, for data whose answers do not depend on the place.
    """

    processor: TripsProcessor
    training: bool = False
    augment: bool = False

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        first_rows = {}
        for row in rows:
            first_rows.setdefault(row["image_id"], row)
        position = {image_id: index for index, image_id in enumerate(first_rows)}
        images = [convert_to_rgb(read_image(row)) for row in first_rows.values()]
        if self.augment and self.training:
            images = [flip_and_shift(image) for image in images]
        try:
            inputs = self.processor(
                images=images,
                text=[row["question"] for row in rows],
                image_index=[position[row["image_id"]] for row in rows],
                return_tensors="pt",
            )
            labels = self.weighted_labels(rows) if self.training else self.single_labels(rows)
        except ValueError as error:
            raise ValueError(f"{error} The batch is: {', '.join(row['source'] for row in rows)}.") from error
        return {**inputs, **labels}

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
            "label_weights": torch.tensor(weights),
        }


def read_image(row: dict) -> PIL.Image.Image:
    """The image of a row whose `image` column is not decoded. Errors name the row."""
    encoded = row["image"]
    try:
        image = PIL.Image.open(encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"]))
        image.load()
    except Exception as error:  # Pillow's plugins raise errors of many kinds on broken files
        raise ValueError(f"{row['source']}: cannot read the image {encoded['path'] or ''}: {error}.") from error
    return image


def flip_and_shift(image: PIL.Image.Image, max_shift: float = 0.125) -> PIL.Image.Image:
    """The image, flipped sideways or not, moved by up to `max_shift` of its size; its border fills what opens up."""
    if torch.rand(()) < 0.5:
        image = F.horizontal_flip(image)
    width, height = image.size
    pad_x, pad_y = int(width * max_shift), int(height * max_shift)
    padded = F.pad(image, [pad_x, pad_y], padding_mode="edge")
    top, left = (int(torch.randint(2 * pad + 1, ())) for pad in (pad_y, pad_x))
    return F.crop(padded, top, left, height, width)


def without_decoding(dataset: datasets.Dataset) -> datasets.Dataset:
    """The data set with `image` left encoded, so that the collator decodes an image once for all of its rows."""
    return dataset.cast_column("image", datasets.Image(decode=False))


def without_long_questions(dataset: datasets.Dataset, processor: TripsProcessor, skip: bool) -> datasets.Dataset:
    """
    The rows whose questions fit the model, found before training starts.

    Raises:
        ValueError: if some do not and `skip` is off, naming the first ones. With `skip` they are counted in a warning.
    """
    limit = processor.tokenizer.model_max_length
    lengths = [len(ids) for ids in processor.tokenizer(list(dataset["question"]))["input_ids"]]
    bad = [row for row, length in enumerate(lengths) if length > limit]
    if not bad:
        return dataset
    first = ", ".join(f"{dataset[row]['source']} ({lengths[row]} tokens)" for row in bad[:5])
    message = f"{len(bad)} of {len(dataset)} questions have more than {limit} tokens: {first}"
    if not skip:
        raise ValueError(f"{message}. Shorten them, or skip them with --skip_bad_rows.")
    logger.warning("Skipped: %s", message)
    return dataset.select([row for row, length in enumerate(lengths) if length <= limit])


def write_whole(path: str | Path, text: str):
    """Writes a file under another name first, so that no part of it ever stands under its own."""
    partial = Path(f"{path}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def make_processor(tokenizer: PreTrainedTokenizerBase, config: TripsConfig) -> TripsProcessor:
    """A processor for a model from scratch: images are resized to the model's size, with CLIP's mean and deviation."""
    size, patch_size = config.vision_config.image_size, config.vision_config.patch_size
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    image_processor = BlipImageProcessor(size={"height": size, "width": size})
    return TripsProcessor(image_processor, tokenizer, patch_size=patch_size)
