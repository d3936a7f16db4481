"""Batches of items from many requests."""

import asyncio
from collections.abc import Callable
from typing import Any

from anyio import to_thread


class Batcher:
    """
    Queue of items. A batch is what arrived while the previous one was computed, so an idle model does not wait.

    Args:
        compute: Function of items of one `kind` that returns a result or an exception for each. It runs in another
            thread, one batch at a time.
        max_size (`int`): Maximum number of items in a batch.
    """

    def __init__(self, compute: Callable[[list], list], max_size: int):
        self.compute = compute
        self.max_size = max_size
        self._waiting: dict[asyncio.Future, Any] = {}  # items by their results
        self._arrived = asyncio.Event()

    async def submit(self, items: list) -> list:
        """Return the results of items, or raise the exception of one. Cancelled items leave the queue."""
        results: list[asyncio.Future] = [asyncio.get_running_loop().create_future() for _ in items]
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
            batch = [result for result, item in self._waiting.items() if item.kind == kind][: self.max_size]
            items = [self._waiting.pop(result) for result in batch]
            for result, value in zip(batch, await to_thread.run_sync(self.compute, items)):
                if not result.done():
                    (result.set_exception if isinstance(value, Exception) else result.set_result)(value)
