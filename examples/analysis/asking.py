"""Inference on one image: answers, kept patches and time, with the checkpoint's schedule and at keep rate 1.0."""

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image
import torch

from modeling_trips import (
    UNPRUNED,
    SelectionSchedule,
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
from modeling_trips.inspection.checkpoints import is_exported, load_checkpoint
from modeling_trips.inspection.pictures import fit_for_drawing
from modeling_trips.inspection.speed import seconds_of_both
from trips_examples.analysis.pictures import draw_scores
from trips_examples.data.boxes import draw_boxes


DRAWN_SIDE = 512  # longer side of a drawing in pixels; pages show it at 256


@dataclass(frozen=True)
class TextResult:
    """
    The result of one text.

    Args:
        text (`str`)
        answers (`list[str]`): Answers with their scores, best first.
        answers_at_keep_rate_1 (`list[str]`): Answers of the same weights at keep rate 1.0.
        pictures (`list[tuple[str, PIL.Image.Image]]`): Titled images: kept patches and scores of each layer; boxes.
    """

    text: str
    answers: list[str]
    answers_at_keep_rate_1: list[str]
    pictures: list[tuple[str, PIL.Image.Image]]


@dataclass(frozen=True)
class Look:
    """
    The results of an image and its texts.

    Args:
        results (`list[TextResult]`): One per text.
        tokens (`list[int]`): Number of output image tokens of each vision layer, with [CLS] and fused tokens.
        milliseconds, milliseconds_at_keep_rate_1 (`float`): Time of a forward pass of all texts, without decoding.
    """

    results: list[TextResult]
    tokens: list[int]
    milliseconds: float
    milliseconds_at_keep_rate_1: float


class Asker:
    """
    A model for question answering, captioning or grounding, with its processor. It is thread-safe.

    Args:
        checkpoint (`str`): A folder, or a name on the Hub.

    Raises:
        ValueError: The checkpoint has another head or incomplete weights, or is an exported model.
    """

    heads = (TripsForQuestionAnswering, TripsForConditionalGeneration, TripsForVisualGrounding)

    def __init__(self, checkpoint: str):
        if is_exported(checkpoint):
            raise ValueError(f"{checkpoint} is an exported model with a fixed schedule. Give its original checkpoint.")
        self.model: TripsPreTrainedModel = load_checkpoint(checkpoint, self.heads)
        self.processor = TripsProcessor.from_pretrained(checkpoint)
        self.lock = threading.Lock()

    @property
    def schedule(self) -> dict[int, tuple[float, str]]:
        """Keep rate and guidance of each selection layer, including layers that keep all patches."""
        vision = self.model.config.vision_config
        return dict(zip(vision.selection_layers, zip(vision.keep_rates, vision.selection_guidances)))

    @torch.no_grad()
    def ask(
        self,
        image: PIL.Image.Image,
        texts: list[str],
        keep_rates: Sequence[float] | None = None,
        guidances: Sequence[str] | None = None,
    ) -> Look:
        """
        Run the model on an image and texts.

        Args:
            image (`PIL.Image.Image`): Upright RGB image.
            texts (`list[str]`)
            keep_rates (`Sequence[float]`), guidances (`Sequence[str]`): Replace those of the checkpoint, one per layer
                of `schedule`.

        Raises:
            ValueError: A text is too long for the model, or a keep rate or guidance is invalid.
        """
        self.check_lengths(texts)
        schedule = self._changed(keep_rates, guidances)
        with self.lock:
            inputs = self.processor(images=image, text=texts, image_index=[0] * len(texts), return_tensors="pt")
            inputs = {**inputs.to(self.model.device), "schedule": schedule}
            answers_at_1, _ = self._answers(image, texts, {**inputs, "schedule": UNPRUNED})
            answers, boxes = self._answers(image, texts, inputs)
            base = self.model.base_model
            output = base(**inputs, output_hidden_states=True)
            selections = dict(zip(schedule.layers, output.selection))
            seconds, seconds_at_1 = seconds_of_both(base, inputs, repeats=3)
        states = (output.vision_model_output or output).hidden_states
        tokens = [layer.shape[1] for layer in states[1:]]
        small, _ = fit_for_drawing(image, max_side=DRAWN_SIDE)
        results = [
            TextResult(text, own, at_1, [*picture, *self._drawn(small, row, selections)])
            for row, (text, own, at_1, picture) in enumerate(zip(texts, answers, answers_at_1, boxes))
        ]
        return Look(results, tokens, 1000 * seconds, 1000 * seconds_at_1)

    def check_lengths(self, texts: list[str]):
        """Raise a `ValueError` if a text has more tokens than the model's limit."""
        limit = self.processor.max_text_length(self.model.config)
        for text, tokens in zip(texts, self.processor.tokenizer(self.processor.clean_texts(texts))["input_ids"]):
            if len(tokens) > limit:
                raise ValueError(f"The text '{text[:30]}...' has {len(tokens)} tokens; at most {limit} are possible.")

    def _changed(self, keep_rates: Sequence[float] | None, guidances: Sequence[str] | None) -> SelectionSchedule:
        """Return the checkpoint's schedule with other keep rates and guidances, one per layer of `schedule`."""
        config = copy.deepcopy(self.model.config.vision_config)
        config.keep_rate = list(keep_rates or config.keep_rates)
        config.selection_guidance = list(guidances or config.selection_guidances)
        config.validate()
        return config.schedule

    def _answers(self, image: PIL.Image.Image, texts: list[str], inputs: dict):
        """Return the answers of each text with their scores, and titled images of boxes."""
        none: list[list[tuple[str, PIL.Image.Image]]] = [[] for _ in texts]
        if isinstance(self.model, TripsForQuestionAnswering):
            pipeline = TripsVisualQuestionAnsweringPipeline(model=self.model, processor=self.processor)
            found = pipeline.forward({"inputs": inputs}, top_k=3)["outputs"]
            return [[f"{each['answer']} ({each['score']:.1%})" for each in best] for best in found], none
        if isinstance(self.model, TripsForConditionalGeneration):
            captioner = TripsImageToTextPipeline(model=self.model, processor=self.processor)
            found = captioner.forward({"inputs": inputs})["outputs"]
            return [[captioner.postprocess(own, text)[0]["generated_text"]] for own, text in zip(found, texts)], none
        sizes = [(image.height, image.width)] * len(texts)
        boxes = self.processor.post_process_grounding(self.model(**inputs), sizes).round().tolist()
        pictures = [[("the box", draw_boxes(image, box, box))] for box in boxes]
        return [["box ({:.0f}, {:.0f}) to ({:.0f}, {:.0f})".format(*box)] for box in boxes], pictures

    def _drawn(
        self, image: PIL.Image.Image, row: int, selections: dict[int, TripsSelection]
    ) -> list[tuple[str, PIL.Image.Image]]:
        """Draw the kept patches of each layer for a text, and the scores of the candidates."""
        pictures, size = [], (image.height, image.width)
        for layer, selection in selections.items():
            (kept,) = self.processor.patch_boxes(selection.kept_indices[row : row + 1], [size])
            candidates, scores = selection.candidate_indices[row], selection.scores[row].float()
            (boxes,) = self.processor.patch_boxes(candidates[None], [size])
            pictures.append((f"layer {layer} keeps {len(kept)} patches", draw_kept_patches(image, kept)))
            pictures.append((f"layer {layer}: scores", draw_scores(image, boxes, scores[candidates >= 0].cpu())))
        return pictures
