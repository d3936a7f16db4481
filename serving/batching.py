"""Bounded waiting in BentoML's batching."""

from collections.abc import Callable

from bentoml._internal.marshal.dispatcher import CorkDispatcher, Optimizer

from .errors import RequestError


MAX_WAIT = 0.1  # seconds that an idle model waits for requests in preparation


class BoundedOptimizer(Optimizer):
    """
    Optimizer that waits only for requests in preparation. BentoML's own waits about as long as the last batches,
    including their time in the queue, so a burst of requests delays all later ones.

    Args:
        max_latency (`float`): Maximum latency in seconds.
        is_more_coming: Function that returns whether other requests are in preparation.
    """

    def __init__(self, max_latency: float, is_more_coming: Callable[[], bool]):
        self.is_more_coming = is_more_coming
        super().__init__(max_latency)

    @property
    def wait(self) -> float:
        return MAX_WAIT if self.is_more_coming() else 0.0

    @wait.setter
    def wait(self, of_past_batches: float):
        pass


def adjust(dispatcher: CorkDispatcher, is_more_coming: Callable[[], bool]):
    """Bound the wait of a dispatcher, and answer requests that it rejects."""
    seconds = dispatcher.max_latency

    def refuse():
        return RequestError(503, f"The request would wait longer than {seconds:g} s. Try again later.").response

    dispatcher.optimizer = BoundedOptimizer(seconds, is_more_coming)
    dispatcher.fallback = refuse
