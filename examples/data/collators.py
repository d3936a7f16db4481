"""Batches of the tasks and of pre-training: sampling by image, each image decoded once, and inputs of the models."""

import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import PIL.Image
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import DataCollatorForLanguageModeling

from modeling_trips import TripsProcessor
from trips_examples.data.images import first_rows, read_image


Images = list[PIL.Image.Image]


class ImageGroupedSampler(Sampler[int]):
    """
    Sampler of rows in random order, with up to `group_size` rows of one image (or pair of images) next to each other,
    so that they share its cached image states. The groups of an image are as equal as can be: 6 rows are 3 and 3 if 5
    may be together. `seed` and epoch decide the order, which is that of all processes.
    """

    def __init__(self, image_ids: Sequence[Hashable], group_size: int, seed: int = 0):
        self.group_size = group_size
        self.seed = seed
        self.epoch = 0
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
            num_groups = math.ceil(len(rows) / self.group_size)
            bounds = [len(rows) * number // num_groups for number in range(num_groups + 1)]
            groups += [rows[start:end] for start, end in pairwise(bounds)]
        rng.shuffle(groups)
        return chain.from_iterable(groups)


@dataclass
class ImageBatchCollator:
    """
    Base of collators from rows with encoded images to model inputs. Each image is decoded once per batch. A batch also
    has `sources`, the sources of its rows for error messages, which [`ImageGroupedTrainer`] removes.

    Raises:
        `ValueError`: A batch cannot be made. The message names its rows.
    """

    processor: TripsProcessor

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        images, image_index = self.distinct_images(rows)
        sources = [row["source"] for row in rows]
        try:
            inputs = self.encode(images, image_index, rows)
        except ValueError as error:
            raise ValueError(f"{str(error).rstrip('.')}. The batch is: {', '.join(sources)}.") from error
        return {**inputs, "sources": sources}

    def encode(self, images: Images, image_index: list, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return the inputs and labels of the model. Row i has image `image_index[i]`."""
        raise NotImplementedError

    def inputs(self, images: Images, image_index: list, texts: list[str]) -> dict[str, torch.Tensor]:
        return dict(self.processor(images=images, text=texts, image_index=image_index, return_tensors="pt"))

    def boxes(self, images: Images, image_index: list, boxes: list) -> torch.Tensor:
        """Return boxes as the models take them, and zeros in place of None."""
        given = []
        sizes = []
        for box, index in zip(boxes, image_index):
            width, height = images[index].size
            given.append(box or (0, 0, width, height))
            sizes.append((height, width))
        encoded = self.processor.encode_boxes(given, sizes)  # (num_rows, 4)
        is_known = torch.tensor([bool(box) for box in boxes])
        return encoded * is_known[:, None]

    def distinct_images(self, rows: list[dict]) -> tuple[Images, list]:
        """Return the distinct images of the rows, upright and RGB, and the index of each row's image."""
        firsts, image_index = first_rows([row["image_id"] for row in rows])
        images = [read_image(rows[first], self.processor.patch_size) for first in firsts]
        return images, image_index


@dataclass
class VqaCollator(ImageBatchCollator):
    """
    Collator from rows of `TASKS["vqa"]` to inputs of [`TripsForQuestionAnswering`]. In training, all distinct
    answers of a question are labels, weighted by their number of annotators (`text_index`, `loss_weights`), and
    `regions` are added if a row has a `region`. In evaluation, the label is the most common answer.
    """

    training: bool = False

    def encode(self, images: Images, image_index: list[int], rows: list[dict]) -> dict:
        inputs = self.inputs(images, image_index, [row["question"] for row in rows])
        if not self.training:
            most_common = [max(row["answers"], key=row["answers"].count) for row in rows]
            inputs["labels"] = self.processor.encode_answers(most_common)
            return inputs
        text_index = []
        texts = []
        weights = []
        for question, row in enumerate(rows):
            for answer, count in Counter(row["answers"]).items():
                text_index.append(question)
                texts.append(answer)
                weights.append(count / len(row["answers"]))
        inputs["labels"] = self.processor.encode_answers(texts)
        inputs["text_index"] = torch.tensor(text_index)
        inputs["loss_weights"] = torch.tensor(weights)
        regions = [row.get("region") for row in rows]
        if any(regions):
            inputs["regions"] = self.boxes(images, image_index, regions)
        return inputs


@dataclass
class CaptionCollator(ImageBatchCollator):
    """
    Collator from rows of `TASKS["captions"]` to inputs of [`TripsForConditionalGeneration`]. `prompt` is the text of
    every image. In training, the captions of an image in one batch share its encoding (`text_index`).
    """

    training: bool = False
    prompt: str = ""

    def encode(self, images: Images, image_index: list[int], rows: list[dict]) -> dict:
        labels = self.processor.encode_answers([row["caption"] for row in rows])
        if self.training:
            inputs = dict(self.processor(images=images, text=[self.prompt] * len(images), return_tensors="pt"))
            inputs["text_index"] = torch.tensor(image_index)
        else:
            inputs = self.inputs(images, image_index, [self.prompt] * len(rows))
        inputs["labels"] = labels
        return inputs


@dataclass
class GroundingCollator(ImageBatchCollator):
    """Collator from rows of `TASKS["grounding"]` to inputs of [`TripsForVisualGrounding`]."""

    def encode(self, images: Images, image_index: list[int], rows: list[dict]) -> dict:
        inputs = self.inputs(images, image_index, [row["expression"] for row in rows])
        inputs["labels"] = self.boxes(images, image_index, [row["box"] for row in rows])
        return inputs


@dataclass
class Nlvr2Collator(ImageBatchCollator):
    """
    Collator from rows of `TASKS["nlvr2"]` to inputs of [`TripsForImagesAndTextClassification`]. Row i has the
    left image `image_index[i, 0]` and the right image `image_index[i, 1]`.
    """

    def distinct_images(self, rows: list[dict]) -> tuple[Images, list]:
        rows_of_images = []
        for row in rows:
            for image, image_id in zip(row["images"], row["image_ids"]):
                rows_of_images.append({"image": image, "image_id": image_id, "source": row["source"]})
        images, image_index = super().distinct_images(rows_of_images)
        return images, list(zip(image_index[::2], image_index[1::2]))

    def encode(self, images: Images, image_index: list[tuple[int, int]], rows: list[dict]) -> dict:
        inputs = self.inputs(images, image_index, [row["statement"] for row in rows])
        inputs["labels"] = torch.tensor([row["label"] for row in rows])
        return inputs


@dataclass
class RetrievalCollator(ImageBatchCollator):
    """
    Collator from rows of `TASKS["captions"]` to inputs of [`TripsForRetrieval`] with its losses. `image_ids` are
    numbers of the images, equal in all processes.
    """

    def encode(self, images: Images, image_index: list[int], rows: list[dict]) -> dict:
        inputs = self.inputs(images, image_index, [row["caption"] for row in rows])
        distinct_ids = dict.fromkeys(row["image_id"] for row in rows)
        inputs["image_ids"] = torch.tensor([number_of(image_id) for image_id in distinct_ids])
        return inputs


def number_of(text: str) -> int:
    """Return a number below 2^63 for a text, a hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass
class PretrainingCollator(RetrievalCollator):
    """
    Collator from rows with `image`, `image_id` and `caption` to inputs of [`TripsForPreTraining`].

    It adds inputs of masked language modeling (`masks_words`) and of prefix language modeling (`cuts_captions`).
    `seed` and the batch's rows determine masked words and cuts, independently of resuming and of the number of
    workers. Of the words, 15% are masked: 80% of them become [MASK], 10% another word, and 10% stay.
    """

    masks_words: bool = True
    cuts_captions: bool = True
    seed: int = 0

    def __call__(self, rows: list[dict]) -> dict:
        lines = [f"{row['source']}\t{row['caption']}" for row in rows]
        rows_and_seed = "\n".join([str(self.seed), *lines])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(number_of(rows_and_seed))
            return super().__call__(rows)

    def encode(self, images: Images, image_index: list[int], rows: list[dict]) -> dict:
        inputs = super().encode(images, image_index, rows)
        if self.masks_words:
            inputs |= self.masked_words(inputs["input_ids"])
        if self.cuts_captions:
            inputs |= self.cut_captions(inputs["input_ids"])
        return inputs

    def masked_words(self, input_ids: torch.LongTensor) -> dict[str, torch.LongTensor]:
        """Mask words of `(num_texts, text_length)`. The labels are the masked tokens, and -100 elsewhere."""
        tokenizer = self.processor.tokenizer
        special = torch.isin(input_ids, torch.tensor(tokenizer.all_special_ids))
        masker = DataCollatorForLanguageModeling(tokenizer)
        masked, labels = masker.torch_mask_tokens(input_ids.clone(), special_tokens_mask=special)
        return {"mlm_input_ids": masked, "mlm_labels": labels}

    def cut_captions(self, input_ids: torch.LongTensor) -> dict[str, torch.LongTensor]:
        """
        Cut captions, `(num_texts, text_length)`, at random between two words. The beginnings have the special tokens
        of a prompt; the continuations end with [SEP]. A caption of one word is not cut, and its labels are all -100.
        """
        tokenizer = self.processor.tokenizer
        first = tokenizer.cls_token_id
        last = tokenizer.sep_token_id
        special = {first, last, tokenizer.pad_token_id}
        draws = torch.rand(len(input_ids)).tolist()
        beginnings = []
        continuations = []
        for caption, draw in zip(input_ids.tolist(), draws):
            words = [token for token in caption if token not in special]
            cut = 1 + int(draw * (len(words) - 1))  # 1 to len(words) - 1
            rest = [*words[cut:], last] if len(words) > cut else [-100]
            beginnings.append([first, *words[:cut], last])
            continuations.append(torch.tensor(rest))
        prompts = tokenizer.pad({"input_ids": beginnings}, return_tensors="pt")
        return {
            "prompt_input_ids": prompts["input_ids"],
            "prompt_attention_mask": prompts["attention_mask"],
            "labels": pad_sequence(continuations, batch_first=True, padding_value=-100),
        }
