"""What images share among their texts, kept for the next ones: the least recently used leave first."""

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock

import torch

from modeling_trips import TripsVisionPrefix


TENSORS = ("hidden_states", "class_query", "key", "candidate_indices", "candidate_mask")


def split(prefix: TripsVisionPrefix) -> list[TripsVisionPrefix]:
    """
    One prefix per image, each with memory of its own. What the layers before it kept is left out: no answer needs it.
    """
    rows = []
    for row in range(len(prefix.hidden_states)):
        tensors = {name: prefix[name] for name in TENSORS if prefix.get(name) is not None}
        rows.append(_with_tensors(prefix, {name: tensor[row : row + 1].clone() for name, tensor in tensors.items()}))
    return rows


def join(prefixes: list[TripsVisionPrefix]) -> TripsVisionPrefix:
    """The inverse of `split`, for prefixes of one `form`."""
    first = prefixes[0]
    names = [name for name in TENSORS if first.get(name) is not None]
    return _with_tensors(first, {name: torch.cat([prefix[name] for prefix in prefixes]) for name in names})


def form(prefix: TripsVisionPrefix) -> Hashable:
    """Equal for prefixes that one batch can hold."""
    return prefix.hidden_states.shape[1:], prefix.grid_size, prefix.candidate_mask is None


def num_bytes(prefix: TripsVisionPrefix) -> int:
    return sum(prefix[name].nbytes for name in TENSORS if prefix.get(name) is not None)


def _with_tensors(prefix: TripsVisionPrefix, tensors: dict[str, torch.Tensor]) -> TripsVisionPrefix:
    return TripsVisionPrefix(**tensors, selection=(), next_layer=prefix.next_layer, grid_size=prefix.grid_size)


class PrefixCache:
    """
    Prefixes of single images by key, of at most `max_bytes` together. Threads may share it.

    Args:
        max_bytes (`int`): 0 keeps nothing.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._prefixes: OrderedDict[Hashable, TripsVisionPrefix] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._prefixes)

    def get(self, key: Hashable) -> TripsVisionPrefix | None:
        with self._lock:
            if key in self._prefixes:
                self._prefixes.move_to_end(key)
            return self._prefixes.get(key)

    def put(self, key: Hashable, prefix: TripsVisionPrefix):
        size = num_bytes(prefix)
        with self._lock:
            if key in self._prefixes or size > self.max_bytes:
                return
            self._prefixes[key] = prefix
            self.bytes += size
            while self.bytes > self.max_bytes:
                _, oldest = self._prefixes.popitem(last=False)
                self.bytes -= num_bytes(oldest)
