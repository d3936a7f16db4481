"""What images share among their texts, kept for the next ones: the least recently used leave first."""

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock

import torch

from modeling_trips import TripsVisionPrefix


def tensors_of(prefix: TripsVisionPrefix) -> dict[str, torch.Tensor]:
    return {name: value for name, value in prefix.items() if isinstance(value, torch.Tensor)}


def split(prefix: TripsVisionPrefix) -> list[TripsVisionPrefix]:
    """
    One prefix per image, each with memory of its own. What the layers before it kept is left out: no answer needs it.
    """
    return [
        _with_tensors(prefix, {name: value[row : row + 1].clone() for name, value in tensors_of(prefix).items()})
        for row in range(len(prefix.hidden_states))
    ]


def join(prefixes: list[TripsVisionPrefix]) -> TripsVisionPrefix:
    """The inverse of `split`, for prefixes of one `form`."""
    names = tensors_of(prefixes[0])
    return _with_tensors(prefixes[0], {name: torch.cat([prefix[name] for prefix in prefixes]) for name in names})


def form(prefix: TripsVisionPrefix) -> Hashable:
    """Equal for prefixes that one batch can hold."""
    shapes = tuple((name, value.shape[1:]) for name, value in tensors_of(prefix).items())
    return shapes, prefix.grid_size, prefix.next_layer


def num_bytes(prefix: TripsVisionPrefix) -> int:
    return sum(value.nbytes for value in tensors_of(prefix).values())


def _with_tensors(prefix: TripsVisionPrefix, tensors: dict[str, torch.Tensor]) -> TripsVisionPrefix:
    fields = {name: value for name, value in prefix.items() if not isinstance(value, torch.Tensor)}
    return TripsVisionPrefix(**{**fields, **tensors, "selection": ()})


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
