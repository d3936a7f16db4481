"""
TRIPS checkpoints as models of lmms-eval, for question answering, captioning or grounding.

    lmms-eval --model trips --model_args pretrained=outputs/vqa --tasks vqav2_val --batch_size 64
    lmms-eval --model trips --model_args pretrained=outputs/grounding,keep_rate=1.0 --tasks refcoco_bbox_rec_val

Prompts of tasks are written for instruction-following models. This model takes only the question or the expression,
and has its own prompt for captions. It generates with the options of its checkpoint, not of a task.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import PIL.Image
import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm.auto import tqdm

from modeling_trips import (
    TripsForConditionalGeneration,
    TripsForQuestionAnswering,
    TripsForVisualGrounding,
    TripsImageToTextPipeline,
    TripsProcessor,
    TripsVisualQuestionAnsweringPipeline,
    convert_to_rgb,
)
from modeling_trips.inspection.checkpoints import load_checkpoint


Batch = list[tuple[PIL.Image.Image, list[str]]]  # images, each with the texts about it


def question_in(context: str) -> str:
    """Return the first line of a task's prompt, without image tokens and instructions."""
    return context.replace("<image>", "").strip().partition("\n")[0].strip()


def expression_in(context: str) -> str:
    """Return the text after the last colon of a task's prompt."""
    return context.replace("<image>", "").rpartition(":")[2].strip()


class Trips(lmms):
    """
    Args:
        pretrained (`str`): Folder or Hub repository of a checkpoint.
        batch_size (`int`, *optional*, defaults to 32): Images per step.
        device (`str`, *optional*): Device. Default: the device of this process.
        dtype (`str`, *optional*, defaults to `"float32"`): Dtype of the weights.
        keep_rate (`float`, *optional*): Keep rate instead of the checkpoint's. At 1.0, accuracy differs from a model
            trained without selection.
        prompt (`str`, *optional*): Prompt of captions.

    Raises:
        ValueError: The checkpoint has no head for answers, captions or boxes, or as `load_checkpoint` raises.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 32,
        device: str | None = None,
        dtype: str = "float32",
        keep_rate: float | None = None,
        prompt: str = "",
    ):
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size, self.prompt = int(batch_size), prompt
        changes: dict[str, Any] = {} if keep_rate is None else {"keep_rate": float(keep_rate)}
        heads = (TripsForQuestionAnswering, TripsForConditionalGeneration, TripsForVisualGrounding)
        model = load_checkpoint(pretrained, heads, dtype=dtype, **changes)
        self.write = {
            "TripsForQuestionAnswering": self.answers,
            "TripsForConditionalGeneration": self.captions,
            "TripsForVisualGrounding": self.boxes,
        }[type(model).__name__]
        self.model = model.to(device or self.accelerator.device)
        self.processor = TripsProcessor.from_pretrained(pretrained)
        pipelines = {self.answers: TripsVisualQuestionAnsweringPipeline, self.captions: TripsImageToTextPipeline}
        if self.write in pipelines:
            self.pipe = pipelines[self.write](model=self.model, processor=self.processor, device=self.model.device)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return an answer, a caption or a relative box, `"[x0, y0, x1, y1]"`, for each request."""
        results = []
        with tqdm(total=len(requests), desc="TRIPS", disable=self.rank != 0) as bar:
            images = self.by_image(requests)
            while batch := list(itertools.islice(images, self.batch_size)):
                found = self.write(batch)
                results += found
                bar.update(len(found))
        return results

    def by_image(self, requests: list[Instance]) -> Iterator[tuple[PIL.Image.Image, list[str]]]:
        """Group consecutive texts about one image, which share its cached states."""

        def image_and_text(request: Instance) -> tuple[PIL.Image.Image, str]:
            context, _, visual_of, number, task, split = request.args
            images = visual_of(self.task_dict[task][split][number])
            if len(images) != 1:
                raise ValueError(f"{task}, {split}, {number}: TRIPS needs one image, got {len(images)}.")
            return convert_to_rgb(images[0]), context

        pairs = map(image_and_text, requests)
        for _, group in itertools.groupby(pairs, key=lambda pair: (pair[0].size, pair[0].tobytes())):
            images, texts = zip(*group)
            yield images[0], list(texts)

    def answers(self, batch: Batch) -> list[str]:
        items = [{"image": image, "question": [question_in(text) for text in texts]} for image, texts in batch]
        found = self.pipe(items, top_k=1, batch_size=len(items))
        return [answers[0]["answer"] for of_image in found for answers in of_image]

    def captions(self, batch: Batch) -> list[str]:
        found = self.pipe([image for image, _ in batch], prompt=self.prompt, batch_size=len(batch))
        return [captions[0]["generated_text"] for (_, texts), captions in zip(batch, found) for _ in texts]

    @torch.no_grad()
    def boxes(self, batch: Batch) -> list[str]:
        texts = [expression_in(text) for _, of_image in batch for text in of_image]
        image_index = [number for number, (_, of_image) in enumerate(batch) for _ in of_image]
        images = [image for image, _ in batch]
        inputs = self.processor(images=images, text=texts, image_index=image_index, return_tensors="pt")
        outputs = self.model(**inputs.to(self.model.device, self.model.dtype))
        sizes = torch.tensor([images[index].size for index in image_index])
        found = self.processor.post_process_grounding(outputs, sizes.flip(-1)) / sizes.repeat(1, 2)
        return [f"[{', '.join(f'{place:.4f}' for place in box)}]" for box in found.tolist()]

    def loglikelihood(self, requests: list[Instance]):
        raise NotImplementedError("`trips` only generates text. Choose a task with output_type generate_until.")

    def generate_until_multi_round(self, requests: list[Instance]):
        raise NotImplementedError("`trips` only supports one round. Choose a task of one round.")
