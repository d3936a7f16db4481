"""Batches of the tasks: sampling by image, each image decoded once, and inputs of the models."""

import hashlib
import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import PIL.Image
import torch
from torch.utils.data import Sampler

from modeling_trips import TripsProcessor
from trips_examples.data.images import first_rows, read_image


class ImageGroupedSampler(Sampler[int]):
    """
    Sampler of rows in random order, with up to `group_size` rows of one image next to each other, so that they share
    its cached image states.

    Args:
        image_ids (`Sequence[Hashable]`): image or images of each row.
        group_size (`int`): number of rows of an image that stay together.
        seed (`int`): seed of the order, together with the epoch. All processes have the same order.
    """

    def __init__(self, image_ids: Sequence[Hashable], group_size: int, seed: int = 0):
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


@dataclass
class ImageBatchCollator:
    """
    Base of collators from rows with encoded images to model inputs. Each image is decoded once per batch. Subclasses
    implement `encode`. A batch also has `sources`, the sources of its rows for error messages, which
    [`ImageGroupedTrainer`] removes.

    Args:
        processor (`TripsProcessor`)

    Raises:
        `ValueError`: A batch cannot be made. The message names its rows.
    """

    processor: TripsProcessor

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        images, image_index = self.distinct_images(rows)
        try:
            inputs = self.encode(images, image_index, rows)
        except ValueError as error:
            sources = ", ".join(row["source"] for row in rows)
            raise ValueError(f"{str(error).rstrip('.')}. The batch is: {sources}.") from error
        return {**inputs, "sources": [row["source"] for row in rows]}

    def encode(self, images: list[PIL.Image.Image], image_index: list, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return the inputs and labels of the model. Row i has image `image_index[i]`."""
        raise NotImplementedError

    def inputs(self, images: list[PIL.Image.Image], image_index: list, texts: list[str]) -> dict[str, torch.Tensor]:
        return self.processor(images=images, text=texts, image_index=image_index, return_tensors="pt")

    def distinct_images(self, rows: list[dict]) -> tuple[list[PIL.Image.Image], list]:
        """Return the distinct images of the rows, upright and RGB, and the index of each row's image or images."""
        images = [image for row in rows for image in row.get("images") or [row["image"]]]
        ids = [image_id for row in rows for image_id in row.get("image_ids") or [row["image_id"]]]
        per_row = len(images) // len(rows)
        firsts, index = first_rows(ids)
        read = [
            read_image({"image": images[first], "source": rows[first // per_row]["source"]}, self.processor.patch_size)
            for first in firsts
        ]
        return read, index if per_row == 1 else [index[row : row + 2] for row in range(0, len(index), 2)]


# Tasks


@dataclass
class VqaCollator(ImageBatchCollator):
    """
    Collator from rows of `TASKS["vqa"]` to inputs of [`TripsForQuestionAnswering`]. In training, all distinct
    answers of a question are labels, weighted by their number of annotators (`text_index`, `loss_weights`), and
    `regions` are added for rows with a `region`. In evaluation, the label is the most common answer.

    Args:
        training (`bool`): whether the batches are for training.
    """

    training: bool = False

    def encode(self, images: list[PIL.Image.Image], image_index: list[int], rows: list[dict]) -> dict:
        inputs = self.inputs(images, image_index, [row["question"] for row in rows])
        if not self.training:
            return {**inputs, **self.single_labels(rows)}
        sizes = [(images[index].height, images[index].width) for index in image_index]
        return {**inputs, **self.weighted_labels(rows), **self.regions(rows, sizes)}

    def regions(self, rows: list[dict], sizes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Return the target regions of the rows in images of `sizes` (height, width); unknown regions are empty."""
        known = [place for place, row in enumerate(rows) if row.get("region")]
        if not known:
            return {}
        regions = torch.zeros(len(rows), 4)
        boxes, sizes = [rows[place]["region"] for place in known], [sizes[place] for place in known]
        regions[known] = self.processor.encode_boxes(boxes, sizes)
        return {"regions": regions}

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
            "labels": self.processor.encode_answers(list(answers)),
            "text_index": torch.tensor(text_index),
            "loss_weights": torch.tensor(weights),
        }


@dataclass
class CaptionCollator(ImageBatchCollator):
    """
    Collator from rows of `TASKS["captions"]` to inputs of [`TripsForConditionalGeneration`]. In training, the
    captions of an image in one batch share its encoding (`text_index`).

    Args:
        training (`bool`): whether the batches are for training.
        prompt (`str`): text input of every image.
    """

    training: bool = False
    prompt: str = ""

    def encode(self, images: list[PIL.Image.Image], image_index: list[int], rows: list[dict]) -> dict:
        labels = self.processor.encode_answers([row["caption"] for row in rows])
        if not self.training:
            return {**self.inputs(images, image_index, [self.prompt] * len(rows)), "labels": labels}
        inputs = self.processor(images=images, text=[self.prompt] * len(images), return_tensors="pt")
        return {**inputs, "labels": labels, "text_index": torch.tensor(image_index)}


@dataclass
class GroundingCollator(ImageBatchCollator):
    """Collator from rows of `TASKS["grounding"]` to inputs of [`TripsForVisualGrounding`]."""

    def encode(self, images: list[PIL.Image.Image], image_index: list[int], rows: list[dict]) -> dict:
        inputs = self.inputs(images, image_index, [row["expression"] for row in rows])
        sizes = [(images[index].height, images[index].width) for index in image_index]
        return {**inputs, "labels": self.processor.encode_boxes([row["box"] for row in rows], sizes)}


@dataclass
class Nlvr2Collator(ImageBatchCollator):
    """
    Collator from rows of `TASKS["nlvr2"]` to inputs of [`TripsForImagesAndTextClassification`]. Row i has the
    left image `image_index[i, 0]` and the right image `image_index[i, 1]`.
    """

    def encode(self, images: list[PIL.Image.Image], image_index: list[list[int]], rows: list[dict]) -> dict:
        inputs = self.inputs(images, image_index, [row["statement"] for row in rows])
        return {**inputs, "labels": torch.tensor([row["label"] for row in rows])}


@dataclass
class RetrievalCollator(ImageBatchCollator):
    """
    Collator from rows of `TASKS["captions"]` to inputs of [`TripsForRetrieval`] with its losses. `image_ids` are
    numbers of the images, equal in all processes.
    """

    def encode(self, images: list[PIL.Image.Image], image_index: list[int], rows: list[dict]) -> dict:
        inputs = self.inputs(images, image_index, [row["caption"] for row in rows])
        image_ids = [number_of(image_id) for image_id in dict.fromkeys(row["image_id"] for row in rows)]
        return {**inputs, "image_ids": torch.tensor(image_ids)}


def number_of(image_id: str) -> int:
    """Return a number below 2^63 for an image, a hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), "big") >> 1


def a_text_per_image(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the inputs of a [`TripsModel`] from a batch of any task. A text with several images is repeated."""
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in inputs}
    image_index = inputs.get("image_index")
    if image_index is None:
        image_index = torch.arange(len(inputs["input_ids"]), device=inputs["input_ids"].device)
    if image_index.ndim == 2:
        texts = {name: rows.repeat_interleave(image_index.shape[1], dim=0) for name, rows in texts.items()}
        image_index = image_index.flatten()
    return texts | {"pixel_values": inputs["pixel_values"], "image_index": image_index}
