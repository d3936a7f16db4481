"""How BentoML gathers batches, with a bound on how long it waits for further requests."""

from bentoml._internal.marshal.dispatcher import CorkDispatcher, Optimizer

from .errors import RequestError


MAX_WAIT = 0.01  # seconds that an idle model waits for further requests


class BoundedOptimizer(Optimizer):
    """
    BentoML waits about as long as the last batches waited, which includes their time in the queue. Without a bound, a
    burst of requests makes all later ones wait.
    """

    def trigger_refresh(self):
        super().trigger_refresh()
        self.wait = min(self.wait, MAX_WAIT)


def adjust(dispatcher: CorkDispatcher):
    """Bound the wait of a dispatcher, and answer what it refuses."""
    seconds = dispatcher.max_latency

    def refuse():
        return RequestError(503, f"The request would wait longer than {seconds:g} s. Try again later.").response

    dispatcher.optimizer = BoundedOptimizer(seconds)
    dispatcher.fallback = refuse
