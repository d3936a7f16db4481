"""How BentoML gathers batches: it waits for requests that are on their way, and for no others."""

from collections.abc import Callable

from bentoml._internal.marshal.dispatcher import CorkDispatcher, Optimizer

from .errors import RequestError


MAX_WAIT = 0.1  # seconds that an idle model waits for requests whose images and texts are being prepared


class BoundedOptimizer(Optimizer):
    """
    BentoML waits about as long as the last batches waited, which includes their time in the queue: a burst of requests
    would make all later ones wait.

    Args:
        max_latency (`float`): in seconds.
        is_more_coming: whether other requests are being prepared.
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
    """Bound the wait of a dispatcher, and answer what it refuses."""
    seconds = dispatcher.max_latency

    def refuse():
        return RequestError(503, f"The request would wait longer than {seconds:g} s. Try again later.").response

    dispatcher.optimizer = BoundedOptimizer(seconds, is_more_coming)
    dispatcher.fallback = refuse
