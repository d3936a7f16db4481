"""The cache of image states."""

import pytest
import torch
from tiny_retrieval import images, make_model


pytest.importorskip("granian")

from trips_serving.cache import ImageCaches, join, num_bytes, split  # noqa: E402


@pytest.mark.parametrize("guidance", ["text", ["image", "text"], "image"])
@torch.no_grad()
def test_rows_of_image_caches_split_and_join(guidance):
    model = make_model(selection_guidance=guidance)
    whole = model.model.encode_images(images())
    rows = split(whole)
    order = torch.tensor([2, 0])
    joined = join([rows[2], rows[0]])
    tokens = torch.tensor([[1, 5, 2], [1, 8, 2]])
    expected = model.match(tokens, image_cache=whole, image_index=order).itm_logits
    torch.testing.assert_close(model.match(tokens, image_cache=joined).itm_logits, expected)
    # A row does not keep the memory of its batch.
    assert num_bytes(rows[0]) == sum(value.untyped_storage().nbytes() for value in rows[0].tensors.values())


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
