"""Model of the service, which computes batches of items from many requests."""

import asyncio
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from anyio import to_thread
from prometheus_client import Counter
from starlette.exceptions import HTTPException

from modeling_trips import TripsImageCache
from modeling_trips.inspection.checkpoints import is_exported, load_checkpoint, load_processor, local_folder
from modeling_trips.untrusted_images import IsolatedDecoder

from .schemas import EXAMPLE_IMAGE, read_base64
from .settings import Settings


logger = logging.getLogger(__name__)

DECODERS = 2  # processes that decode images
GENERATIVE = {"visual-question-answering": "answer", "image-to-text": "caption"}  # endpoints by task
STATUSES = {"format": 415, "pixels": 413}  # by the reason of an `ImageError`; 422 for others

IMAGE_CACHES = Counter("trips_image_caches", "Images by the source of their cached states.", ["source"])


@dataclass
class ItemImage:
    """Image of items: its file, or then its pixels of shape `(1, num_channels, height, width)`, and cached states."""

    name: str  # in the request
    key: Hashable  # of the file and of the layers before the first that a text scores
    data: bytes | None
    pixel_values: torch.Tensor | None = None
    states: TripsImageCache | None = None
    size: tuple[int, int] = (0, 0)  # height and width of the decoded file


@dataclass(frozen=True)
class Item:
    """Input of one result: an image, a text, or both."""

    endpoint: str
    image: ItemImage | None = None
    text: str | None = None
    tokens: dict[str, list[int]] | None = None  # outputs of the tokenizer for the text
    top_k: int = 1
    threshold: float = 0.0  # of the score of an answer
    place: dict[str, int] = field(default_factory=dict)  # indices of the image and the text in the request
    kept_patches: bool = False  # returned with the answer; needs a decoded image
    keep_rate: float | None = None  # in place of the schedule's

    @property
    def kind(self) -> Hashable:
        """Key that is equal for items that can share a batch."""
        return self.endpoint, self.top_k, self.kept_patches, self.keep_rate, self.image is None


def tensors_of(image_cache: TripsImageCache) -> list[torch.Tensor]:
    """Return the tensors of a cache in the order of its `map`."""
    of_layers = [tensor for layer in image_cache.selection for tensor in layer.to_tuple()]
    return [*image_cache.tensors.values(), *of_layers]


def num_bytes(image_cache: TripsImageCache) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(image_cache))


def joined(image_caches: list[TripsImageCache]) -> TripsImageCache:
    """Return one cache of the images of several, which have one size."""
    parts = zip(*(tensors_of(each) for each in image_caches))
    return image_caches[0].map(lambda _: torch.cat(next(parts)))


class ImageCaches:
    """Thread-safe LRU cache of single images' caches of at most `max_bytes`."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._image_caches: OrderedDict[Hashable, TripsImageCache] = OrderedDict()  # the least recently used first
        self._lock = Lock()

    def get(self, key: Hashable) -> TripsImageCache | None:
        with self._lock:
            if key in self._image_caches:
                self._image_caches.move_to_end(key)
            return self._image_caches.get(key)

    def put(self, key: Hashable, image_cache: TripsImageCache):
        with self._lock:
            if key not in self._image_caches:
                self._image_caches[key] = image_cache
                self.bytes += num_bytes(image_cache)
            while self.bytes > self.max_bytes:
                _, oldest = self._image_caches.popitem(last=False)
                self.bytes -= num_bytes(oldest)


class Engine:
    """Engine that prepares requests (thread-safe) and computes batches (one thread at a time)."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.cache = ImageCaches(settings.cache_bytes)
        folder = local_folder(settings.model, settings.revision)
        self.decoder = IsolatedDecoder(DECODERS)
        self.model = self._load(folder)
        self.processor = load_processor(folder, self.model.config)
        schedule = self.model.config.vision_config.schedule
        self.schedules: dict = {None: schedule}  # by the keep rate of a request
        for rate in settings.keep_rates:
            self.schedules[rate] = schedule.with_keep_rate(rate)
        self.endpoints = []
        if hasattr(self.model, "match"):
            self.endpoints = ["match", "features"]
        if self.model.can_generate():
            self.pipeline = self.model.pipeline_class(model=self.model, processor=self.processor, device=-1)
            self.endpoints = [GENERATIVE[self.pipeline.default_task]]
        if not self.endpoints:
            raise ValueError(f"A {type(self.model).__name__} does not answer, caption or match.")
        self._check()

    def _load(self, folder: Path) -> Any:
        settings = self.settings
        if not is_exported(folder):
            fields: dict = {"schedule": settings.schedule} if settings.schedule else {}
            model = load_checkpoint(folder, dtype=settings.dtype, **fields)
            device = settings.device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            return model.to(device)
        if settings.model_fields_set & {"schedule", "keep_rates", "dtype", "device"}:
            raise ValueError(
                "An exported model is fixed. Unset TRIPS_SCHEDULE, TRIPS_KEEP_RATES, TRIPS_DTYPE and TRIPS_DEVICE."
            )
        from modeling_trips.export import load_exported  # an extra

        return load_exported(folder)

    def _check(self):
        """Compute one item of each kind. Raise a `ValueError` if a result is not finite."""
        image = ItemImage("image", key="", data=read_base64(EXAMPLE_IMAGE))
        self.decode(image)
        text = "what is it?"
        (tokens,) = self.prepare_texts("texts", [text])
        for endpoint in self.endpoints:
            items = [Item(endpoint, image=image, text=text, tokens=tokens)]
            if endpoint == "features":
                items = [Item(endpoint, image=image), Item(endpoint, tokens=tokens)]
            for item in items:
                json.dumps(self._compute([item]), allow_nan=False)

    def find_image(self, name: str, data: bytes, decodes: bool = False, keep_rate: float | None = None) -> ItemImage:
        """Return an image with its file, and with its cached states if there are any and it need not be decoded."""
        schedule = self.schedules[keep_rate]
        stop = schedule.first_text_layer
        key = (hashlib.sha256(data).hexdigest(), stop, schedule.before(stop))
        states = None if decodes else self.cache.get(key)
        return ItemImage(name, key, data, states=states)

    def decode(self, image: ItemImage):
        """Decode and preprocess the file of an image. An `HTTPException` gives its name."""
        try:
            decoded = self.decoder.decode(image.data, self.settings.max_pixels)
            image.size = decoded.size[::-1]
            image.pixel_values = self.processor(images=decoded, return_tensors="pt")["pixel_values"]
        except ValueError as error:
            status = STATUSES.get(getattr(error, "reason", ""), 422)
            raise HTTPException(status, f"{image.name}: {error}") from error
        image.data = None

    def prepare_texts(self, name: str, texts: list[str]) -> list[dict[str, list[int]]]:
        """Tokenize texts. The `HTTPException` for a text that is too long gives its name in the request."""
        if not texts:
            return []
        encoded = self.processor.tokenizer(self.processor.clean_texts(texts))
        rows = [dict(zip(encoded, values)) for values in zip(*encoded.values())]
        limit = self.processor.max_text_length(self.model.config)
        for position, row in enumerate(rows):
            length = len(row["input_ids"])
            if length > limit:
                message = f"{name}.{position}: The text must have at most {limit} tokens, got {length}."
                raise HTTPException(422, message)
        return rows

    def compute(self, items: list[Item]) -> list:
        """Compute the results of items of one kind. The result of a failed item is an `HTTPException`."""
        try:
            return self._compute(items)
        except Exception:
            if len(items) == 1:
                logger.exception("The model failed on an item of /%s.", items[0].endpoint)
                return [HTTPException(500, "The model failed on this request.")]
            return [result for item in items for result in self.compute([item])]

    @torch.inference_mode()
    def _compute(self, items: list[Item]) -> list:
        first = items[0]
        inputs: dict = {}
        if first.tokens is not None:
            padded = self.processor.tokenizer.pad([item.tokens for item in items], return_tensors="pt")
            inputs |= padded.to(self.model.device)
        if first.image is not None:
            inputs |= self._image_inputs(items)
        method = getattr(self, f"_{first.endpoint}")
        return method(items, inputs)

    def _answer(self, items: list[Item], inputs: dict) -> list[list[dict]]:
        first = items[0]
        outputs = self.pipeline.forward({"inputs": inputs}, top_k=first.top_k, keep_rate=first.keep_rate)
        answers = []
        for item, answers_of_item in zip(items, outputs["outputs"]):
            answers.append(self.pipeline.postprocess(answers_of_item, item.threshold))
        selection = outputs["selection"]
        if selection and first.kept_patches:
            sizes = [item.image.size for item in items]
            boxes_per_item = self.processor.patch_boxes(selection[-1].kept_indices, sizes)
            for answers_of_item, boxes in zip(answers, boxes_per_item):
                answers_of_item[0]["kept_patches"] = boxes.tolist()
        return answers

    def _caption(self, items: list[Item], inputs: dict) -> list[str]:
        outputs = self.pipeline.forward({"inputs": inputs}, keep_rate=items[0].keep_rate)
        captions = []
        for item, texts in zip(items, outputs["outputs"]):
            (best,) = self.pipeline.postprocess(texts, item.text)
            captions.append(best["generated_text"])
        return captions

    def _match(self, items: list[Item], inputs: dict) -> list[dict]:
        logits = self.model.match(**inputs, keep_rate=items[0].keep_rate).itm_logits  # (num_items, 2)
        scores = logits.softmax(-1)[:, 1].tolist()
        return [{**item.place, "score": score} for item, score in zip(items, scores)]

    def _features(self, items: list[Item], inputs: dict) -> list[dict]:
        if items[0].image is None:
            features = self.model.get_text_features(**inputs).pooler_output
        else:
            rows = inputs.pop("image_index")
            features = self.model.get_image_features(**inputs).pooler_output[rows]
        return [{**item.place, "features": row} for item, row in zip(items, features.tolist())]

    def _image_inputs(self, items: list[Item]) -> dict:
        """Return the states of the images of items, and the row of each item in them. Each image is encoded once."""
        images = {item.image.key: item.image for item in items}
        states = {}
        for key, image in images.items():
            states[key] = image.states or self.cache.get(key)
        missing = [key for key in images if states[key] is None]
        IMAGE_CACHES.labels("cache").inc(len(images) - len(missing))
        IMAGE_CACHES.labels("computed").inc(len(missing))
        if missing:
            pixel_values = torch.cat([images[key].pixel_values for key in missing])
            computed = self.model.base_model.encode_images(
                pixel_values.to(self.model.device), keep_rate=items[0].keep_rate
            )
            for row, key in enumerate(missing):
                states[key] = computed[row : row + 1].map(torch.clone)  # memory of its own
                self.cache.put(key, states[key])
        keys = list(states)
        image_index = [keys.index(item.image.key) for item in items]
        return {
            "image_cache": joined(list(states.values())),
            "image_index": torch.tensor(image_index, device=self.model.device),
        }


class Batcher:
    """
    Queue of items. A batch, of at most `max_size` items, is what arrived while the previous one was computed, so an
    idle model does not wait. `compute` runs in another thread, one batch at a time, and returns a result or an
    exception for each item of one `kind`.
    """

    def __init__(self, compute: Callable[[list], list], max_size: int):
        self.compute = compute
        self.max_size = max_size
        self._waiting: dict[asyncio.Future, Any] = {}  # items by their results
        self._arrived = asyncio.Event()

    async def submit(self, items: list) -> list:
        """Return the results of items, or raise the exception of one. Cancelled items leave the queue."""
        results: list[asyncio.Future] = [asyncio.Future() for _ in items]
        self._waiting.update(zip(results, items))
        self._arrived.set()
        return await asyncio.gather(*results)

    async def run(self):
        """Compute batches until the task is cancelled."""
        while True:
            await self._arrived.wait()
            self._waiting = {result: item for result, item in self._waiting.items() if not result.done()}
            if not self._waiting:
                self._arrived.clear()
                continue
            kind = next(iter(self._waiting.values())).kind
            results_of_kind = [result for result, item in self._waiting.items() if item.kind == kind]
            batch = results_of_kind[: self.max_size]
            items = [self._waiting.pop(result) for result in batch]
            values = await to_thread.run_sync(self.compute, items)
            for result, value in zip(batch, values):
                if result.done():  # its client has left
                    continue
                if isinstance(value, Exception):
                    result.set_exception(value)
                else:
                    result.set_result(value)
