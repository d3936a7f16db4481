"""Model of the service, which computes batches of items from many requests."""

import io
import json
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import PIL.Image
import torch
from prometheus_client import Counter, Gauge

from modeling_trips import (
    UNPRUNED,
    SelectionSchedule,
    TripsForConditionalGeneration,
    TripsForQuestionAnswering,
    TripsImageCache,
    TripsImageToTextPipeline,
    TripsProcessor,
    TripsVisualQuestionAnsweringPipeline,
)
from modeling_trips.image_decoding_trips import ImageError
from modeling_trips.inspection.checkpoints import is_exported, load_checkpoint
from modeling_trips.untrusted_images import IsolatedDecoder

from .cache import ImageCaches, form, join, split
from .errors import RequestError
from .requests import Item, Picture, key_of
from .settings import DEFAULT, Settings


logger = logging.getLogger(__name__)

DECODERS = 2  # processes that decode images
STATUSES = {"empty": 422, "format": 415, "pixels": 413, "work": 422, "broken": 422}  # by `ImageError` reason

IMAGE_CACHES = Counter("trips_image_caches", "Images by the source of their cached states.", ["source"])
CACHE_BYTES = Gauge("trips_image_cache_bytes", "Size of the image cache in bytes.", multiprocess_mode="livesum")


@contextmanager
def blamed_on(variable: str, value) -> Iterator[None]:
    """Add the environment variable to any error."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{variable}={value}: {error}") from error


def load(settings: Settings):
    """
    Load the model with its saved head, or an exported model.

    Raises:
        ValueError: The checkpoint, the device or the dtype is not supported. The message names the variable.
    """
    device, dtype = settings.device, settings.dtype
    if is_exported(settings.model):
        given = {"DTYPE": dtype != "auto", "DEVICE": device not in ("auto", "cpu"), "SCHEDULES": settings.schedules}
        for name in [name for name, is_given in given.items() if is_given]:
            raise ValueError(f"TRIPS_{name} is not supported for the exported model {settings.model}. Unset it.")
    elif dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"TRIPS_DTYPE must be auto or a dtype of PyTorch, such as bfloat16, got {dtype}.")
    with blamed_on("TRIPS_MODEL", settings.model):
        options: dict[str, Any] = {} if dtype == "auto" else {"dtype": dtype}
        if is_exported(settings.model):
            from modeling_trips.export import load_exported  # an extra

            return load_exported(settings.model)
        model = load_checkpoint(settings.model, revision=settings.revision, **options)
    with blamed_on("TRIPS_DEVICE", device):
        best = "cuda" if torch.cuda.is_available() else "cpu"
        return model.to(best if device == "auto" else device)


def endpoints_of(model) -> tuple[str, ...]:
    """Return the endpoints of a head."""
    if isinstance(model, TripsForQuestionAnswering):
        return ("answer",)
    if isinstance(model, TripsForConditionalGeneration):
        return ("caption",)
    if hasattr(model, "match"):
        return ("match", "features")
    raise ValueError(
        f"{type(model).__name__} is not supported. Use a checkpoint for answers, captions, matching or features."
    )


class Engine:
    """
    Engine that prepares requests (thread-safe) and computes batches (one thread at a time).

    Args:
        settings (`Settings`): Settings of the service.

    Raises:
        ValueError: The checkpoint is not supported, or a schedule does not fit it.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.num_preparing = 0
        self.model = load(settings)
        self.cache = ImageCaches(settings.cache_bytes)
        self.decoder = IsolatedDecoder(DECODERS)
        self._tokenizer_lock = Lock()  # fast tokenizers are not thread-safe
        with blamed_on("TRIPS_MODEL", settings.model):
            self.processor = TripsProcessor.from_pretrained(settings.model, revision=settings.revision)
            self.endpoints = endpoints_of(self.model)
        parts = {"model": self.model, "processor": self.processor, "device": self.model.device}
        if "answer" in self.endpoints:
            self._pipeline = TripsVisualQuestionAnsweringPipeline(**parts)
        elif "caption" in self.endpoints:
            self._pipeline = TripsImageToTextPipeline(**parts)
        own = self.model.config.vision_config
        self._schedules: dict[str, SelectionSchedule | None] = {DEFAULT: None}
        for name, schedule in settings.schedules.items():
            with blamed_on("TRIPS_SCHEDULES", f"{name}={schedule}"):
                self._schedules[name] = own.parse_schedule(schedule) if schedule else UNPRUNED
        with blamed_on("TRIPS_MODEL", settings.model):
            self._check()

    def _check(self):
        """
        Compute one item of each kind, which also starts a decoder.

        Raises:
            ValueError: The tokenizer is of another model, or a result is not finite.
        """
        largest = max(self.processor.tokenizer.get_vocab().values())
        vocab_size = self.model.config.text_config.vocab_size
        if largest >= vocab_size:
            raise ValueError(f"token ids of the tokenizer must be below {vocab_size}, got {largest}.")
        file = io.BytesIO()
        PIL.Image.effect_noise((256, 256), 60).save(file, "PNG")
        image = self.decoder.decode(file.getvalue())
        picture = Picture("", self.processor(images=image, return_tensors="pt")["pixel_values"])
        if not picture.pixel_values.isfinite().all():
            raise ValueError("the image processor returns values that are NaN or infinite.")
        text = "what is it?"
        (tokens,) = self.prepare_texts([text])
        for name in self.endpoints:
            parts = [(picture, text, tokens)]
            if name == "features":
                parts = [(picture, None, None), (None, text, tokens)]
            results = getattr(self, name)([Item(*part, DEFAULT, 1, {}) for part in parts])
            json.dumps(results, allow_nan=False)

    def find_image(self, data: bytes, schedule: str) -> Picture:
        """Return an image with its cached states, if any."""
        key = key_of(data)
        return Picture(key, image_cache=self.cache.get((key, schedule)))

    def read_image(self, key: str, data: bytes) -> Picture:
        """Decode and preprocess an image."""
        try:
            image = self.decoder.decode(data, self.settings.max_pixels)
        except ImageError as error:
            raise RequestError(STATUSES[error.reason], str(error)) from error
        try:
            return Picture(key, self.processor(images=image, return_tensors="pt")["pixel_values"])
        except ValueError as error:
            raise RequestError(422, str(error)) from error

    def prepare_texts(self, texts: list[str]) -> list[dict[str, list[int]]]:
        with self._tokenizer_lock:
            encoded = self.processor.tokenizer(self.processor.clean_texts(texts)) if texts else {}
        limit = self.processor.max_text_length(self.model.config)
        rows = [{name: values[row] for name, values in encoded.items()} for row in range(len(texts))]
        for position, row in enumerate(rows):
            if len(row["input_ids"]) > limit:
                raise RequestError(
                    422, f"Text {position} (from 0) must have at most {limit} tokens, got {len(row['input_ids'])}."
                )
        return rows

    def compute(self, name: str, items: list[Item]) -> list:
        """Compute the results of an endpoint. The result of a failed item is a [`RequestError`]."""
        try:
            return getattr(self, name)(items)
        except Exception:
            if len(items) == 1:
                logger.exception("The model failed on an item of /%s.", name)
                return [RequestError(500, "The model failed on this request.")]
            middle = len(items) // 2
            return self.compute(name, items[:middle]) + self.compute(name, items[middle:])

    def answer(self, items: list[Item]) -> list[list[dict]]:
        return self._by_class(items, lambda inputs, top_k: self._pipe(inputs, top_k=top_k))

    def caption(self, items: list[Item]) -> list[str]:
        captions = self._by_class(items, lambda inputs, _: self._pipe(inputs))
        finish = self._pipeline.postprocess
        results = [
            finish(texts, prompt=item.text)  # type: ignore[call-arg]  # the captioning pipeline takes it
            for texts, item in zip(captions, items)
        ]
        return [result["generated_text"] for result, *_ in results]

    def match(self, items: list[Item]) -> list[dict]:
        scores = self._by_class(
            items, lambda inputs, _: self.model.match(**inputs).itm_logits.softmax(-1)[:, 1].tolist()
        )
        return [{**item.place, "score": score} for item, score in zip(items, scores)]

    def features(self, items: list[Item]) -> list[dict]:
        texts = [item for item in items if item.picture is None]
        images = [item for item in items if item.picture is not None]
        of_texts = iter(self._text_features(texts) if texts else [])
        of_images = iter(self._by_class(images, self._image_features))
        return [{**item.place, "features": next(of_texts if item.picture is None else of_images)} for item in items]

    @torch.inference_mode()
    def _text_features(self, items: list[Item]) -> list[list[float]]:
        return self.model.get_text_features(**self._texts(items)).pooler_output.tolist()

    def _image_features(self, inputs: dict, _) -> list[list[float]]:
        images = {name: inputs[name] for name in ("image_cache", "schedule")}
        features = self.model.get_image_features(**images).pooler_output
        return features[inputs["image_index"]].tolist()

    def _pipe(self, inputs: dict, **options) -> list:
        """Run the library's pipeline after its preprocessing."""
        return self._pipeline._forward({"inputs": inputs}, **options)["outputs"]

    @torch.inference_mode()
    def _by_class(self, items: list[Item], compute: Callable[[dict, int], list]) -> list:
        """Compute items with an image in batches of equal shape."""
        image_caches = self._image_caches(items)
        classes: dict[Hashable, list[int]] = {}
        for position, (item, image_cache) in enumerate(zip(items, image_caches)):
            classes.setdefault((item.request_class, form(image_cache)), []).append(position)
        results = [None] * len(items)
        for positions in classes.values():
            own = [items[position] for position in positions]
            by_key = {items[position].picture.key: image_caches[position] for position in positions}
            index = {key: row for row, key in enumerate(by_key)}
            inputs = {} if own[0].tokens is None else self._texts(own)
            inputs["image_cache"] = join(list(by_key.values()))
            inputs["image_index"] = torch.tensor([index[item.picture.key] for item in own], device=self.model.device)
            inputs["schedule"] = self._schedules[own[0].schedule]
            for position, result in zip(positions, compute(inputs, own[0].top_k)):
                results[position] = result
        return results

    def _texts(self, items: list[Item]) -> dict[str, torch.Tensor]:
        padded = self.processor.tokenizer.pad([item.tokens for item in items], return_tensors="pt")
        return dict(padded.to(self.model.device))

    def _image_caches(self, items: list[Item]) -> list[TripsImageCache]:
        """Return an image cache per item; each image is encoded once."""
        known, missing = {}, {}
        for item in items:
            key = item.picture.key, item.schedule
            image_cache = known.get(key) or item.picture.image_cache or self.cache.get(key)
            if image_cache is not None:
                known[key] = image_cache
            else:
                missing.setdefault((item.schedule, item.picture.pixel_values.shape), {})[key] = item.picture
        IMAGE_CACHES.labels("cache").inc(len(known))
        for (schedule, _), pictures in missing.items():
            pixel_values = torch.cat([picture.pixel_values for picture in pictures.values()])
            image_cache = self.model.base_model.encode_images(
                pixel_values.to(self.model.device), schedule=self._schedules[schedule]
            )
            IMAGE_CACHES.labels("computed").inc(len(pictures))
            for key, row in zip(pictures, split(image_cache)):
                known[key] = row
                self.cache.put(key, row)
        CACHE_BYTES.set(self.cache.bytes)
        return [known[item.picture.key, item.schedule] for item in items]
