"""The cache of image states."""

import pytest
import torch
from tiny_retrieval import images, make_model


pytest.importorskip("granian")

from trips_serving.cache import ImageCaches, num_bytes, split  # noqa: E402


@torch.no_grad()
def test_cache_evicts_the_least_recently_used():
    rows = split(make_model().model.encode_images(images()))
    size = num_bytes(rows[0])
    cache = ImageCaches(3 * size)
    for key in range(3):
        cache.put(key, rows[key])
    assert cache.get(0) is rows[0]
    cache.put(3, rows[3])
    assert [cache.get(key) is not None for key in range(4)] == [True, False, True, True]
    assert cache.bytes == 3 * size
    cache.put(3, rows[3])
    assert cache.bytes == 3 * size
    nothing = ImageCaches(size - 1)
    nothing.put(0, rows[0])
    assert nothing.get(0) is None and nothing.bytes == 0
