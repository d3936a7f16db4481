"""The model behind the service: items of many requests in, one result for each out."""

from collections.abc import Callable, Hashable
from copy import deepcopy
from threading import Lock

import torch
from prometheus_client import Counter, Gauge
from transformers import AutoConfig

import modeling_trips
from modeling_trips import (
    TripsForConditionalGeneration,
    TripsForQuestionAnswering,
    TripsImageToTextPipeline,
    TripsProcessor,
    TripsVisionConfig,
    TripsVisionPrefix,
    TripsVisualQuestionAnsweringPipeline,
)
from modeling_trips.inspection.schedules import UNPRUNED, Schedule

from .cache import PrefixCache, form, join, split
from .errors import RequestError
from .images import decode
from .requests import Item, Picture, key_of
from .settings import DEFAULT, Settings


PREFIXES = Counter("trips_image_prefixes", "Images by where their text-independent part came from.", ["source"])
CACHE_BYTES = Gauge("trips_image_cache_bytes", "What the cache of images holds.", multiprocess_mode="livesum")


def load(settings: Settings):
    """
    The model with the head that it was saved with.

    Raises:
        ValueError: if the checkpoint is none of TRIPS.
    """
    config = AutoConfig.from_pretrained(settings.model, revision=settings.revision)
    name = (config.architectures or ["model without a head"])[0]
    model_class = getattr(modeling_trips, name, None)
    if model_class is None:
        raise ValueError(f"TRIPS_MODEL={settings.model} is a {name}: the service takes TRIPS models.")
    model = model_class.from_pretrained(settings.model, revision=settings.revision, dtype=settings.dtype)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(best if settings.device == "auto" else settings.device).eval()


def endpoints_of(model) -> dict[str, str]:
    """What a head can be asked, and the name that the results go by."""
    if isinstance(model, TripsForQuestionAnswering):
        return {"answer": "answers"}
    if isinstance(model, TripsForConditionalGeneration):
        return {"caption": "captions"}
    if hasattr(model, "match"):
        return {"match": "scores", "features": "features"}
    raise ValueError(
        f"A {type(model).__name__} cannot be served: it answers, describes, matches and compares nothing."
    )


def with_schedule(config: TripsVisionConfig, schedule: str) -> TripsVisionConfig:
    """A copy with a schedule as `Schedule.parse` reads it, or, if it is empty, with none."""
    config = deepcopy(config)
    fields = Schedule.parse(schedule) if schedule else UNPRUNED
    for name, value in fields.config_fields.items():
        setattr(config, name, value)
    config.validate()
    return config


class Engine:
    """
    Prepares what requests hold (threads may share that), and computes batches (one thread at a time).

    Args:
        settings (`Settings`)

    Raises:
        ValueError: if the checkpoint has no head to serve, or a schedule does not fit it.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.model = load(settings)
        self.processor = TripsProcessor.from_pretrained(settings.model, revision=settings.revision)
        self.endpoints = endpoints_of(self.model)
        self.cache = PrefixCache(settings.cache_bytes)
        own = self.model.config.vision_config
        self._configs = {name: with_schedule(own, schedule) for name, schedule in settings.schedules.items()}
        self._configs[DEFAULT] = own
        self._tokenizer_lock = Lock()  # a fast tokenizer refuses a second thread
        parts = {"model": self.model, "processor": self.processor, "device": self.model.device}
        if "answer" in self.endpoints:
            self._pipeline = TripsVisualQuestionAnsweringPipeline(**parts)
        elif "caption" in self.endpoints:
            self._pipeline = TripsImageToTextPipeline(**parts)

    def prepare_image(self, data: bytes, schedule: str) -> Picture:
        """An image as the model takes it, or what is known of it already."""
        key = key_of(data)
        prefix = self.cache.get((key, schedule))
        if prefix is not None:
            return Picture(key, prefix=prefix)
        image = decode(data, self.settings.max_pixels)
        try:
            return Picture(key, self.processor(images=image, return_tensors="pt")["pixel_values"])
        except ValueError as error:
            raise RequestError(422, str(error)) from error

    def prepare_texts(self, texts: list[str]) -> list[dict[str, list[int]]]:
        try:
            with self._tokenizer_lock:
                encoded = self.processor(text=texts, padding=False) if texts else {}
        except ValueError as error:
            raise RequestError(422, str(error)) from error
        return [{name: rows[position] for name, rows in encoded.items()} for position in range(len(texts))]

    def answer(self, items: list[Item]) -> list[list[dict]]:
        return self._by_class(items, lambda inputs, top_k: self._pipe(inputs, top_k=top_k))

    def caption(self, items: list[Item]) -> list[str]:
        captions = self._by_class(items, lambda inputs, _: self._pipe(inputs))
        finish = self._pipeline.postprocess
        results = [
            finish(texts, prompt=item.text)  # type: ignore[call-arg]  # the pipeline of captions takes it
            for texts, item in zip(captions, items)
        ]
        return [result["generated_text"] for result, *_ in results]

    def match(self, items: list[Item]) -> list[dict]:
        scores = self._by_class(
            items, lambda inputs, _: self.model.match(**inputs).itm_logits.softmax(-1)[:, 1].tolist()
        )
        return [{**item.place, "score": score} for item, score in zip(items, scores)]

    def features(self, items: list[Item]) -> list[dict]:
        results = [None] * len(items)
        of_images = [position for position, item in enumerate(items) if item.picture is not None]
        of_texts = [position for position, item in enumerate(items) if item.picture is None]
        if of_images:
            images = [items[position] for position in of_images]
            self._scatter(results, of_images, self._by_class(images, self._image_features))
        if of_texts:
            with torch.inference_mode():
                inputs = self._texts([items[position] for position in of_texts])
                self._scatter(results, of_texts, self.model.get_text_features(**inputs).pooler_output.tolist())
        return [{**item.place, "features": result} for item, result in zip(items, results)]

    def _image_features(self, inputs: dict, _) -> list[list[float]]:
        features = self.model.get_image_features(prefix=inputs["prefix"]).pooler_output
        return features[inputs["image_index"]].tolist()

    def _pipe(self, inputs: dict, **options) -> list:
        """As the library's pipeline computes them: past its preparation of images and texts."""
        return self._pipeline._forward({"inputs": inputs}, **options)["outputs"]

    @staticmethod
    def _scatter(results: list, positions: list[int], values: list):
        for position, value in zip(positions, values):
            results[position] = value

    @torch.inference_mode()
    def _by_class(self, items: list[Item], compute: Callable[[dict, int], list]) -> list:
        """Results of items with an image, class by class, so that each batch is rectangular."""
        prefixes = self._prefixes(items)
        classes: dict[Hashable, list[int]] = {}
        for position, (item, prefix) in enumerate(zip(items, prefixes)):
            classes.setdefault((item.request_class, form(prefix)), []).append(position)
        results = [None] * len(items)
        for positions in classes.values():
            own = [items[position] for position in positions]
            by_key = {items[position].picture.key: prefixes[position] for position in positions}
            index = {key: row for row, key in enumerate(by_key)}
            inputs = {} if own[0].tokens is None else self._texts(own)
            inputs["prefix"] = join(list(by_key.values()))
            inputs["image_index"] = torch.tensor([index[item.picture.key] for item in own], device=self.model.device)
            self._select_by(own[0].schedule)
            self._scatter(results, positions, compute(inputs, own[0].top_k))
        return results

    def _texts(self, items: list[Item]) -> dict[str, torch.Tensor]:
        padded = self.processor.tokenizer.pad([item.tokens for item in items], return_tensors="pt")
        return dict(padded.to(self.model.device))

    def _prefixes(self, items: list[Item]) -> list[TripsVisionPrefix]:
        """One per item; each image's is computed once."""
        known, missing = {}, {}
        for item in items:
            key = item.picture.key, item.schedule
            prefix = known.get(key) or item.picture.prefix or self.cache.get(key)
            if prefix is not None:
                known[key] = prefix
            else:
                missing.setdefault((item.schedule, item.picture.pixel_values.shape), {})[key] = item.picture
        PREFIXES.labels("cache").inc(len(known))
        for (schedule, _), pictures in missing.items():
            self._select_by(schedule)
            pixel_values = torch.cat([picture.pixel_values for picture in pictures.values()])
            prefix = self.model.base_model.encode_images(pixel_values.to(self.model.device))
            PREFIXES.labels("computed").inc(len(pictures))
            for key, row in zip(pictures, split(prefix)):
                known[key] = row
                self.cache.put(key, row)
        CACHE_BYTES.set(self.cache.bytes)
        return [known[item.picture.key, item.schedule] for item in items]

    def _select_by(self, schedule: str):
        """The schedule is read in each pass, so that one copy of the weights serves all of them."""
        self.model.base_model.vision_model.config = self._configs[schedule]
