# SPDX-FileCopyrightText: 2026 The TRIPS for Transformers authors
# SPDX-License-Identifier: Apache-2.0
"""
Pipelines for visual question answering and image captioning.

Transformers 5 dropped the tasks `visual-question-answering` and `image-to-text`. The calls and results are those of
version 4; several questions about one image share its computation. Checkpoints name the classes in `custom_pipelines`,
for `pipeline(task, model=..., trust_remote_code=True)`. For a loaded model, call the class.
"""

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils import logging

from .processing_trips import read_image
from .schedule_trips import SelectionSchedule


logger = logging.get_logger(__name__)


def _torch_dataset(inputs):
    """Return a dataset or column of the library `datasets` as a PyTorch dataset, and other inputs unchanged."""
    library = type(inputs).__module__.partition(".")[0]  # `datasets` is an extra and may be missing
    if library != "datasets" or not isinstance(inputs, Sized):
        return inputs
    return Subset(inputs, range(len(inputs)))


def given(**options) -> dict:
    """Return the options that are not `None`."""
    return {name: value for name, value in options.items() if value is not None}


def without_rest(labels: torch.LongTensor, end_token_id: int | list[int] | None) -> torch.LongTensor:
    """Return generated tokens as labels, with -100 after the first end token of each row."""
    if end_token_id is None:
        end_token_id = []
    is_end = torch.isin(labels, labels.new_tensor(end_token_id)).long()
    is_behind_end = is_end.cumsum(dim=-1) > is_end
    return labels.masked_fill(is_behind_end, -100)


def best_answers(pairs: list[tuple[str, float]]) -> list[dict]:
    """Return the answers of (text, probability) pairs, best first. Probabilities of equal texts add up."""
    scores = {}
    for text, score in pairs:
        scores[text] = scores.get(text, 0.0) + score
    # An empty answer or the rest of a word is none, unless there is no other.
    scores = {text: score for text, score in scores.items() if text and not text.startswith("##")} or scores
    best_first = sorted(scores, key=scores.get, reverse=True)
    return [{"score": scores[text], "answer": text} for text in best_first]


class TripsPipeline(Pipeline):
    """Base of the pipelines, whose processor takes images and texts."""

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False

    default_task = ""

    def __init__(self, *args, task: str = "", **kwargs):
        super().__init__(*args, task=task or self.default_task, **kwargs)
        self.check_model_type()

    def check_model_type(self, supported_models=()):
        """Raise a `ValueError` for a model of another library, whatever models Transformers supports."""
        model_type = self.model.config.model_type
        if model_type != "trips":
            raise ValueError(
                f"The pipeline {self.task!r} takes TRIPS models, got a {model_type}. Use a pipeline of Transformers."
            )


class TripsWritingPipeline(TripsPipeline):
    """Base of the pipelines that write. An item is an image with one or more texts; each image is processed once."""

    def __call__(self, inputs, **kwargs):
        """Run the pipeline. Unlike in Transformers, inputs may be empty or come from the library `datasets`."""
        inputs = _torch_dataset(inputs)
        if isinstance(inputs, (list, tuple)) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def make_item(
        self, image, texts: str | list[str], timeout: float | None = None, truncation: bool | str = False
    ) -> dict:
        if isinstance(image, str):
            try:
                image = read_image(image, timeout)
            except Exception as error:  # the network and Pillow raise many types
                raise ValueError(f"The image {image:.200} cannot be used: {error}") from error
        if isinstance(image, (list, tuple)) or getattr(image, "ndim", 3) > 3:
            raise ValueError(f"An item has one image, got {type(image).__name__} of {len(image)}.")
        is_single = isinstance(texts, str)
        return {
            "image": image,
            "texts": [texts] if is_single else texts,
            "single": is_single,
            "truncation": truncation,
        }

    def collate(self, items: list[dict]) -> dict:
        """Return a batch: the model's inputs, and the number of texts of each item."""
        texts = []
        image_index = []
        for position, item in enumerate(items):
            texts += item["texts"]
            image_index += [position] * len(item["texts"])
        inputs = self.processor(
            images=[item["image"] for item in items],
            text=texts,
            image_index=image_index,
            truncation=items[0]["truncation"],  # the same for all items of a call
            return_tensors="pt",
        )
        return {
            "inputs": inputs.to(dtype=self.dtype),
            "num_texts": [len(item["texts"]) for item in items],
            "single": [item["single"] for item in items],
        }

    def get_iterator(
        self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
    ) -> Iterator:
        dataset_class = PipelineDataset if isinstance(inputs, Sized) else PipelineIterator
        dataset = dataset_class(inputs, self.preprocess, preprocess_params)
        batches = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=self.collate)
        for batch in batches:
            outputs = self.forward(batch, **forward_params)["outputs"]  # one per text
            results = [self.postprocess(output, **postprocess_params) for output in outputs]
            start = 0
            for num_texts, is_single in zip(batch["num_texts"], batch["single"]):
                results_of_item = results[start : start + num_texts]
                start += num_texts
                yield results_of_item[0] if is_single else results_of_item

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        (result,) = self.get_iterator(
            [inputs],
            num_workers=0,
            batch_size=1,
            preprocess_params=preprocess_params,
            forward_params=forward_params,
            postprocess_params=postprocess_params,
        )
        return result


class TripsVisualQuestionAnsweringPipeline(TripsWritingPipeline):
    """
    Pipeline that answers questions about images, under the task name `"visual-question-answering"`.

    ```python
    >>> from transformers import pipeline

    >>> oracle = pipeline("visual-question-answering", model="org/trips-vqa", trust_remote_code=True)
    >>> oracle = TripsVisualQuestionAnsweringPipeline(model=model, processor=processor)  # or a loaded model
    >>> oracle(image="picture.png", question="what color is the shape?", top_k=2)
    [{'score': 0.99, 'answer': 'teal'}, {'score': 0.004, 'answer': 'green'}]
    ```
    """

    default_task = "visual-question-answering"
    _non_generation_params = ("top_k",)

    def _sanitize_parameters(
        self, timeout=None, truncation=None, top_k=None, answers=None, threshold=None, generate_kwargs=None, **kwargs
    ):
        forward_params = {**kwargs, **(generate_kwargs or {}), **given(top_k=top_k, answers=answers)}
        return given(timeout=timeout, truncation=truncation), forward_params, given(threshold=threshold)

    def __call__(self, image, question: str | list[str] | None = None, **kwargs):
        """
        Args:
            image: An image (PIL image, path or URL), a list of images or a dataset of them. Without `question`: a dict
                `{"image": ..., "question": ...}`, or a list, dataset or generator of such dicts.
            question (`str` or `list[str]`, *optional*): One or more questions. Each is asked about each image.
            top_k (`int`, *optional*, defaults to 5): Maximum number of answers for each question, and the width of the
                beam search.
            answers (`list[str]`, *optional*): Candidate answers to rank, see
                [`TripsForQuestionAnswering.rank_answers`].
            threshold (`float`, *optional*, defaults to 0.0): An answer of a lower score is "unsure".
            batch_size (`int`, *optional*, defaults to 1): Number of images per batch.
            timeout (`float`, *optional*): Seconds to wait for an image from the web. By default there is no limit.
            truncation (`bool`, *optional*, defaults to `False`): Whether to cut a question that is too long, instead
                of raising an error.
            keep_rate (`float`, *optional*): Share of the patches to keep, in (0, 1]. Default: the model's schedule.
            kwargs: Options of `generate`: `max_new_tokens`, `num_beams`, ...

        Returns:
            `list[dict]` per question, the best answer first: `answer` (`str`) and `score` (`float`), its probability.
            It is calibrated by `config.confidence_temperature`, but not of ranked `answers` (and counts their first
            token twice with `config.answer_ranking="albef"`). A question with words that no training question had has
            `unknown_words` (`list[str]`): its scores mean little. Several images or questions give a list of them,
            ordered by question, then by image. A dataset or a generator gives an
            iterator.

        Raises:
            ValueError: An image cannot be read; a question is missing, empty or too long; or options of `generate`
                come with `answers`.
        """
        image = _torch_dataset(image)
        if question is None:
            return super().__call__(image, **kwargs)
        if not isinstance(image, (list, tuple, Dataset)):
            return super().__call__({"image": image, "question": question}, **kwargs)
        by_image = super().__call__([{"image": one, "question": question} for one in image], **kwargs)
        if isinstance(question, str):
            return by_image
        return [answers[position] for position in range(len(question)) for answers in by_image]

    def preprocess(self, inputs: dict, **options) -> dict:
        if not isinstance(inputs, dict) or not {"image", "question"} <= inputs.keys():
            raise ValueError(f"An input must be a dict with 'image' and 'question', got {inputs!r:.200}.")
        image = inputs["image"]
        question = inputs["question"]
        questions = [question] if isinstance(question, str) else question
        if not questions or not all(isinstance(text, str) and text.strip() for text in questions):
            raise ValueError(f"`question` must be a non-empty text, got {question!r} for {image!r:.200}.")
        return self.make_item(image, question, **options)

    def _forward(
        self,
        batch: dict,
        top_k: int = 5,
        answers: list[str] | None = None,
        keep_rate: float | None = None,
        schedule: SelectionSchedule | str | None = None,
        **generate_kwargs,
    ) -> dict:
        if top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
        inputs = {**batch["inputs"], "keep_rate": keep_rate}
        if schedule is not None:
            inputs["schedule"] = schedule
        if answers is None:
            results = self._write_answers(inputs, top_k, **generate_kwargs)
        elif generate_kwargs:
            names = ", ".join(f"`{name}`" for name in generate_kwargs)
            raise ValueError(f"{names} cannot be combined with `answers`, which are ranked and not generated.")
        else:
            results = self._rank_answers(answers, inputs, top_k)
        for answers_of_text, token_ids in zip(results["outputs"], inputs["input_ids"].tolist()):
            unknown = self._unknown_words(token_ids)
            if unknown:
                logger.warning_once(f"A question has words that the model has not learnt: {', '.join(unknown)}.")
                for answer in answers_of_text:
                    answer["unknown_words"] = unknown
        return results

    def _unknown_words(self, token_ids: list[int]) -> list[str]:
        """Return the tokens of a question that are unknown, or that no training question had."""
        tokenizer = self.processor.tokenizer
        known = {*map(int, (self.model.config.question_tokens or "").split())}
        special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        learnt = known | special
        words = []
        for token in dict.fromkeys(token_ids):
            if token == tokenizer.unk_token_id or (known and token not in learnt):
                words.append(tokenizer.decode([token]).strip())
        return [word for word in words if word]  # a piece may be a space alone

    def postprocess(self, outputs: list[dict], threshold: float = 0.0) -> list[dict]:
        """Return the answers of a question, or "unsure" if the best one has a score below the threshold."""
        return outputs if outputs[0]["score"] >= threshold else [{**outputs[0], "answer": "unsure"}]

    def _write_answers(self, inputs, top_k: int, num_beams: int = 1, **generate_kwargs) -> dict:
        """Return for each question the answers among the `top_k` sequences of a beam search, and the selection."""
        attention_mask = inputs["attention_mask"]
        encoder_outputs = self.model.get_encoder()(**inputs)
        sequences = self.model.generate(
            encoder_outputs=encoder_outputs,
            attention_mask=attention_mask,
            num_beams=max(num_beams, top_k),
            num_return_sequences=top_k,
            **generate_kwargs,
        )
        end_token_id = generate_kwargs.get("eos_token_id", self.model.generation_config.eos_token_id)
        labels = without_rest(sequences[:, 1:], end_token_id)
        text_index = torch.arange(len(attention_mask), device=labels.device).repeat_interleave(top_k)
        scores = self.model.score_labels(
            labels=labels,
            encoder_outputs=encoder_outputs,
            attention_mask=attention_mask,
            text_index=text_index,
            temperature=self.model.config.confidence_temperature,
        )
        texts = self.processor.post_process_answers(sequences)
        pairs = list(zip(texts, scores.exp().tolist()))
        starts = range(0, len(pairs), top_k)
        outputs = [best_answers(pairs[start : start + top_k]) for start in starts]
        return {"outputs": outputs, "selection": encoder_outputs.selection}

    def _rank_answers(self, answers: list[str], inputs, top_k: int) -> dict:
        """Return for each question the `top_k` best of the given answers, and the selection."""
        answer_ids = self.processor.encode_answers(answers).to(self.device)
        ranking = self.model.rank_answers(answer_ids, k=max(top_k, 128), **inputs)  # at least as many as by default
        indices = ranking.answer_indices[:, :top_k].tolist()
        scores = ranking.scores[:, :top_k].exp().tolist()
        ranked = []
        for indices_of_text, scores_of_text in zip(indices, scores):
            pairs = zip(indices_of_text, scores_of_text)
            ranked.append([{"score": score, "answer": answers[index]} for index, score in pairs])
        return {"outputs": ranked, "selection": ranking.selection}


class TripsImageToTextPipeline(TripsWritingPipeline):
    """
    Pipeline that generates captions, under the task name `"image-to-text"`.

    Args of a call:
        inputs: An image (PIL image, path or URL), or a list, dataset or generator of them.
        prompt (`str`, *optional*): Beginning of the caption. It also selects the patches.
        batch_size, timeout, truncation, keep_rate: As in [`TripsVisualQuestionAnsweringPipeline`].
        kwargs: Options of `generate`: `max_new_tokens`, `num_beams`, `num_return_sequences`, ...

    A call returns `list[dict]` per image, with `generated_text` (`str`) of each sequence. A list of images gives a
    list of them, a dataset or a generator gives an iterator. An image that cannot be read, or a prompt that is too
    long for the model, is a `ValueError`.

    ```python
    >>> from transformers import pipeline

    >>> captioner = pipeline("image-to-text", model="org/trips-captioning", trust_remote_code=True)
    >>> captioner = TripsImageToTextPipeline(model=model, processor=processor)  # or a loaded model
    >>> captioner("picture.png", prompt="a picture of")
    [{'generated_text': 'a picture of a teal circle'}]
    ```
    """

    default_task = "image-to-text"

    def _sanitize_parameters(self, timeout=None, truncation=None, prompt=None, generate_kwargs=None, **kwargs):
        if not isinstance(prompt, (str, type(None))):
            raise ValueError(f"`prompt` must be one text for all images, got {prompt!r:.200}.")
        preprocess_params = given(timeout=timeout, truncation=truncation, prompt=prompt)
        return preprocess_params, {**kwargs, **(generate_kwargs or {})}, given(prompt=prompt)

    def preprocess(self, image, prompt: str = "", **options) -> dict:
        return self.make_item(image, prompt, **options)

    def _forward(self, batch: dict, num_return_sequences: int = 1, **generate_kwargs) -> dict:
        sequences = self.model.generate(
            **batch["inputs"], num_return_sequences=num_return_sequences, **generate_kwargs
        )
        texts = self.processor.post_process_answers(sequences)
        starts = range(0, len(texts), num_return_sequences)
        return {"outputs": [texts[start : start + num_return_sequences] for start in starts]}

    def postprocess(self, texts: list[str], prompt: str = "") -> list[dict]:
        return [{"generated_text": f"{prompt.rstrip()} {text}".strip()} for text in texts]


__all__ = ["TripsImageToTextPipeline", "TripsVisualQuestionAnsweringPipeline"]
