"""
A TRIPS checkpoint as a model of lmms-eval: it answers, describes, or finds boxes, as its head does.

    lmms-eval --model trips --model_args pretrained=outputs/vqa --tasks vqav2_val --batch_size 64
    lmms-eval --model trips --model_args pretrained=outputs/grounding,keep_rate=1.0 --tasks refcoco_bbox_rec_val

Tasks are written for models that are told in words what to do. This one knows, so that it takes the question
or the expression alone, and captions with its own prompt. It writes with the options of its checkpoint, not of a task.
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
    """The first line of what a task says, without the mark of an image: behind it are orders."""
    return context.replace("<image>", "").strip().partition("\n")[0].strip()


def expression_in(context: str) -> str:
    """What stands behind the last colon of what a task says."""
    return context.replace("<image>", "").rpartition(":")[2].strip()


class Trips(lmms):
    """
    Args:
        pretrained (`str`): a checkpoint, by folder or name.
        batch_size (`int`, *optional*, defaults to 32): images per step.
        device (`str`, *optional*): that of this process by default.
        dtype (`str`, *optional*, defaults to `"float32"`): of the weights.
        keep_rate (`float`, *optional*): in place of the checkpoint's. At 1.0, accuracy is not an unpruned model's.
        prompt (`str`, *optional*): how captions begin.

    Raises:
        ValueError: The checkpoint has no head that answers, describes or finds boxes, or as `load_checkpoint` raises.
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
        """An answer, a caption, or a box, `"[x0, y0, x1, y1]"` in shares of the image's sides, for each request."""
        results = []
        with tqdm(total=len(requests), desc="TRIPS", disable=self.rank != 0) as bar:
            images = self.by_image(requests)
            while batch := list(itertools.islice(images, self.batch_size)):
                found = self.write(batch)
                results += found
                bar.update(len(found))
        return results

    def by_image(self, requests: list[Instance]) -> Iterator[tuple[PIL.Image.Image, list[str]]]:
        """Each image with the texts about it that follow one another: they share its computation."""

        def image_and_text(request: Instance) -> tuple[PIL.Image.Image, str]:
            context, _, visual_of, number, task, split = request.args
            images = visual_of(self.task_dict[task][split][number])
            if len(images) != 1:
                raise ValueError(f"{task}, {split}, {number}: TRIPS looks at one image, not at {len(images)}.")
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
        raise NotImplementedError("TRIPS writes in lmms-eval: choose a task whose output_type is generate_until.")

    def generate_until_multi_round(self, requests: list[Instance]):
        raise NotImplementedError("TRIPS answers one question at a time: choose a task of one round.")
