"""LRU cache of the image states that texts share."""

from collections.abc import Hashable
from dataclasses import replace
from threading import Lock

import torch

from modeling_trips import TripsImageCache


def split(image_cache: TripsImageCache) -> list[TripsImageCache]:
    """Split an image cache into one per image, each with its own memory and without recorded selections."""
    image_cache = replace(image_cache, selection=())
    return [image_cache[row : row + 1].map(torch.clone) for row in range(len(image_cache.hidden_states))]


def join(image_caches: list[TripsImageCache]) -> TripsImageCache:
    """Join image caches of images of one size under one schedule."""
    first = image_caches[0]
    return replace(first, **{name: torch.cat([one.tensors[name] for one in image_caches]) for name in first.tensors})


def num_bytes(image_cache: TripsImageCache) -> int:
    return sum(value.nbytes for value in image_cache.tensors.values())


class ImageCaches:
    """Thread-safe LRU cache of single images' caches of at most `max_bytes`."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._image_caches: dict[Hashable, TripsImageCache] = {}  # the least recently used first
        self._lock = Lock()

    def get(self, key: Hashable) -> TripsImageCache | None:
        with self._lock:
            if (found := self._image_caches.pop(key, None)) is not None:
                self._image_caches[key] = found
            return found

    def put(self, key: Hashable, image_cache: TripsImageCache):
        with self._lock:
            if key not in self._image_caches:
                self._image_caches[key] = image_cache
                self.bytes += num_bytes(image_cache)
            while self.bytes > self.max_bytes:
                self.bytes -= num_bytes(self._image_caches.pop(next(iter(self._image_caches))))
