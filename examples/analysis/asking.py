"""A checkpoint that is asked about one image at a time: what it says, what it kept, what that took, and its twin."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import PIL.Image
import torch
from transformers import BatchFeature

from modeling_trips import (
    TripsConfig,
    TripsForConditionalGeneration,
    TripsForQuestionAnswering,
    TripsForVisualGrounding,
    TripsImageToTextPipeline,
    TripsPreTrainedModel,
    TripsProcessor,
    TripsSelection,
    TripsVisualQuestionAnsweringPipeline,
)
from modeling_trips.inspection import draw_kept_patches
from modeling_trips.inspection.speed import seconds_of_both
from trips_examples.analysis.pictures import draw_scores
from trips_examples.data.boxes import draw_boxes


@dataclass(frozen=True)
class Told:
    """
    What came of a text.

    Args:
        text (`str`)
        answers, twins_answers (`list[str]`): the model's and those of its unpruned twin, with scores, best first.
        pictures (`list[tuple[str, PIL.Image.Image]]`): titled: kept patches and scores of each selection layer; boxes.
    """

    text: str
    answers: list[str]
    twins_answers: list[str]
    pictures: list[tuple[str, PIL.Image.Image]]


@dataclass(frozen=True)
class Look:
    """
    What came of an image and its texts.

    Args:
        told (`list[Told]`): one per text.
        tokens (`list[int]`): image tokens that leave each vision layer, [CLS] and fused tokens included.
        milliseconds, twins_milliseconds (`float`): of a forward pass of all texts, without answers being written.
    """

    told: list[Told]
    tokens: list[int]
    milliseconds: float
    twins_milliseconds: float


class Asker:
    """
    A model that answers questions, writes captions or finds boxes, and its processor. Threads take turns.

    Args:
        checkpoint (`str`): a folder, or a name on the Hub.

    Raises:
        ValueError: if the checkpoint does something else.
    """

    heads = (TripsForQuestionAnswering, TripsForConditionalGeneration, TripsForVisualGrounding)

    def __init__(self, checkpoint: str):
        heads = {head.__name__: head for head in self.heads}
        (name, *_) = TripsConfig.from_pretrained(checkpoint).architectures or [""]
        if name not in heads:
            raise ValueError(f"{checkpoint} is a {name or 'model of no task'}: take one of {', '.join(heads)}.")
        self.model: TripsPreTrainedModel = heads[name].from_pretrained(checkpoint).eval()
        self.processor = TripsProcessor.from_pretrained(checkpoint)
        self.lock = threading.Lock()

    @property
    def schedule(self) -> dict[int, tuple[float, str]]:
        """Keep rate and guidance of each selection layer, those that keep all included."""
        vision = self.model.config.vision_config
        rates = vision.keep_rate if isinstance(vision.keep_rate, (list, tuple)) else [vision.keep_rate]
        rates = list(rates) * (len(vision.selection_layers) if len(rates) == 1 else 1)
        return dict(zip(vision.selection_layers, zip(rates, vision.selection_guidances)))

    @torch.no_grad()
    def ask(
        self,
        image: PIL.Image.Image,
        texts: list[str],
        keep_rates: Sequence[float] | None = None,
        guidances: Sequence[str] | None = None,
    ) -> Look:
        """
        Asks about an image, upright and RGB.

        Args:
            image (`PIL.Image.Image`), texts (`list[str]`)
            keep_rates (`Sequence[float]`), guidances (`Sequence[str]`): in place of the checkpoint's, one per layer of
                `schedule`.

        Raises:
            ValueError: if a text is too long for the model, or a rate or guidance is none.
        """
        own_rates, own_guidances = zip(*self.schedule.values()) if self.schedule else ((), ())
        rates, guidances = list(keep_rates or own_rates), list(guidances or own_guidances)
        with self.lock:
            inputs = self.processor(images=image, text=texts, image_index=[0] * len(texts), return_tensors="pt")
            inputs = inputs.to(self.model.device)
            with self._scheduled([1.0] * len(rates), guidances):
                twins_answers, _ = self._answers(image, texts, inputs)
            with self._scheduled(rates, guidances):
                answers, boxes = self._answers(image, texts, inputs)
                base = self.model.base_model
                output = base(**inputs, output_hidden_states=True)
                selections = dict(zip(self.model.config.vision_config.selection_schedule, output.selection))
                seconds, twins_seconds = seconds_of_both(base, inputs, repeats=3)
        states = (output.vision_model_output or output).hidden_states
        tokens = [layer.shape[1] for layer in states[1:]]
        told = [
            Told(text, own, twins, [*picture, *self._drawn(image, row, selections)])
            for row, (text, own, twins, picture) in enumerate(zip(texts, answers, twins_answers, boxes))
        ]
        return Look(told, tokens, 1000 * seconds, 1000 * twins_seconds)

    @contextlib.contextmanager
    def _scheduled(self, rates: list[float], guidances: list[str]) -> Iterator[None]:
        config = self.model.config
        before = config.keep_rate, config.selection_guidance
        try:
            if rates:
                config.keep_rate, config.selection_guidance = rates, guidances
                config.vision_config.validate()
            yield
        finally:
            config.keep_rate, config.selection_guidance = before

    def _answers(self, image: PIL.Image.Image, texts: list[str], inputs: BatchFeature):
        """For each text the answers with their scores, and titled pictures of them."""
        none: list[list[tuple[str, PIL.Image.Image]]] = [[] for _ in texts]
        if isinstance(self.model, TripsForQuestionAnswering):
            pipeline = TripsVisualQuestionAnsweringPipeline(model=self.model, processor=self.processor)
            found = pipeline(image, texts, top_k=3)
            return [[f"{each['answer']} ({each['score']:.1%})" for each in best] for best in found], none
        if isinstance(self.model, TripsForConditionalGeneration):
            captioner = TripsImageToTextPipeline(model=self.model, processor=self.processor)
            return [[captioner(image, prompt=text)[0]["generated_text"]] for text in texts], none
        sizes = [(image.height, image.width)] * len(texts)
        boxes = self.processor.post_process_grounding(self.model(**inputs), sizes).round().tolist()
        pictures = [[("the box", draw_boxes(image, box, box))] for box in boxes]
        return [["box ({:.0f}, {:.0f}) to ({:.0f}, {:.0f})".format(*box)] for box in boxes], pictures

    def _drawn(
        self, image: PIL.Image.Image, row: int, selections: dict[int, TripsSelection]
    ) -> list[tuple[str, PIL.Image.Image]]:
        """Of each layer what a text kept of the image, and how it scored the candidates."""
        pictures, size = [], (image.height, image.width)
        for layer, selection in selections.items():
            (kept,) = self.processor.patch_boxes(selection.kept_indices[row : row + 1], [size])
            candidates, scores = selection.candidate_indices[row], selection.scores[row].float()
            (boxes,) = self.processor.patch_boxes(candidates[None], [size])
            pictures.append((f"layer {layer} keeps {len(kept)} patches", draw_kept_patches(image, kept)))
            pictures.append((f"layer {layer}: scores", draw_scores(image, boxes, scores[candidates >= 0].cpu())))
        return pictures
