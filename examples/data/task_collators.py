"""Collators of the tasks, from rows to model inputs."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import PIL.Image
import torch
from torchvision.transforms.v2 import functional as F

from trips_examples.data.boxes import mirrored_row
from trips_examples.data.collators import ImageBatchCollator, distinct_images, draw_move, move_box, move_image
from trips_examples.data.tasks import has_area


@dataclass
class VqaCollator(ImageBatchCollator):
    """
    Collator from rows of `tasks.VQA_FEATURES` to inputs of [`TripsForQuestionAnswering`]. In training, all distinct
    answers of a question are labels, weighted by their number of annotators (`text_index`, `loss_weights`), and
    `regions` are added for rows with a `region`. In evaluation, the label is the most common answer.
    """

    def encode(self, images: list[PIL.Image.Image], image_index: list[int], rows: list[dict]) -> dict:
        inputs = self.processor(
            images=images, text=[row["question"] for row in rows], image_index=image_index, return_tensors="pt"
        )
        if not self.training:
            return {**inputs, **self.single_labels(rows)}
        sizes = [(images[index].height, images[index].width) for index in image_index]
        return {**inputs, **self.weighted_labels(rows), **self.regions(rows, sizes)}

    def regions(self, rows: list[dict], sizes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Return the target regions of the rows in images of `sizes` (height, width); unknown regions are empty."""
        known = [place for place, row in enumerate(rows) if _has_region(row)]
        if not known:
            return {}
        regions = torch.zeros(len(rows), 4)
        boxes, sizes = [rows[place]["region"] for place in known], [sizes[place] for place in known]
        regions[known] = self.processor.encode_boxes(boxes, sizes)
        return {"regions": regions}

    def augmented(
        self, images: list[PIL.Image.Image], image_index: list[int], rows: list[dict]
    ) -> tuple[list[PIL.Image.Image], list[dict]]:
        """Flip and shift the images together with the target regions of their rows."""
        moves = [draw_move(image.size) for image in images]
        rows = [
            {**row, "region": move_box(row["region"], moves[index], images[index].size)} if _has_region(row) else row
            for row, index in zip(rows, image_index)
        ]
        return [move_image(image, move) for image, move in zip(images, moves)], rows

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


def _has_region(row: dict) -> bool:
    return bool(row.get("region")) and has_area(row["region"])


@dataclass
class CaptionCollator(ImageBatchCollator):
    """
    Collator from rows of `tasks.CAPTION_FEATURES` to inputs of [`TripsForConditionalGeneration`]. In training, the
    captions of an image in one batch share its encoding (`text_index`).

    Args:
        prompt (`str`): text input of every image.
    """

    prompt: str = ""

    flips: ClassVar[bool] = False  # captions may mention left and right

    def encode(self, images: list[PIL.Image.Image], image_index: list[int], rows: list[dict]) -> dict:
        labels = self.processor.encode_answers([row["caption"] for row in rows])
        if not self.training:
            prompts = [self.prompt] * len(rows)
            inputs = self.processor(images=images, text=prompts, image_index=image_index, return_tensors="pt")
            return {**inputs, "labels": labels}
        inputs = self.processor(images=images, text=[self.prompt] * len(images), return_tensors="pt")
        return {**inputs, "labels": labels, "text_index": torch.tensor(image_index)}


@dataclass
class GroundingCollator(ImageBatchCollator):
    """Collator from rows of `tasks.GROUNDING_FEATURES` to inputs of [`TripsForVisualGrounding`]."""

    def encode(self, images: list[PIL.Image.Image], image_index: list[int], rows: list[dict]) -> dict:
        inputs = self.processor(
            images=images, text=[row["expression"] for row in rows], image_index=image_index, return_tensors="pt"
        )
        sizes = [(images[index].height, images[index].width) for index in image_index]
        return {**inputs, "labels": self.processor.encode_boxes([row["box"] for row in rows], sizes)}

    def augmented(
        self, images: list[PIL.Image.Image], image_index: list[int], rows: list[dict]
    ) -> tuple[list[PIL.Image.Image], list[dict]]:
        """Flip half of the images horizontally, with the boxes and words of their rows."""
        flips = torch.rand(len(images)) < 0.5
        rows = [
            mirrored_row(row, images[index].width) if flips[index] else row for row, index in zip(rows, image_index)
        ]
        return [F.horizontal_flip(image) if flip else image for image, flip in zip(images, flips)], rows


@dataclass
class Nlvr2Collator(ImageBatchCollator):
    """
    Collator from rows of `tasks.NLVR2_FEATURES` to inputs of [`TripsForImagesAndTextClassification`]. Row i has the
    left image `image_index[i, 0]` and the right image `image_index[i, 1]`.
    """

    def distinct_images(self, rows: list[dict]) -> tuple[list[PIL.Image.Image], list[list[int]]]:
        sides = [
            {"image": image, "image_id": image_id, "source": row["source"]}
            for row in rows
            for image, image_id in zip(row["images"], row["image_ids"], strict=True)
        ]
        images, index = distinct_images(sides, self.processor.patch_size)
        return images, [list(pair) for pair in zip(index[::2], index[1::2])]

    def encode(self, images: list[PIL.Image.Image], image_index: list[list[int]], rows: list[dict]) -> dict:
        inputs = self.processor(
            images=images, text=[row["statement"] for row in rows], image_index=image_index, return_tensors="pt"
        )
        return {**inputs, "labels": torch.tensor([row["label"] for row in rows])}


@dataclass
class RetrievalCollator(ImageBatchCollator):
    """
    Collator from rows of `tasks.CAPTION_FEATURES` to inputs of [`TripsForRetrieval`] with its losses. `image_ids` are
    numbers of the images, equal in all processes.
    """

    flips: ClassVar[bool] = False  # captions may mention left and right

    def encode(self, images: list[PIL.Image.Image], image_index: list[int], rows: list[dict]) -> dict:
        captions = [row["caption"] for row in rows]
        inputs = self.processor(images=images, text=captions, image_index=image_index, return_tensors="pt")
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
