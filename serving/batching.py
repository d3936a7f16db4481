"""Batches of items from many requests."""

import asyncio
from collections import deque
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
        self._entries: deque[tuple[Any, asyncio.Future]] = deque()
        self._arrived = asyncio.Event()

    async def submit(self, items: list) -> list:
        """Return the results of items, or raise the exception of one. Cancelled items leave the queue."""
        entries = [(item, asyncio.get_running_loop().create_future()) for item in items]
        self._entries.extend(entries)
        self._arrived.set()
        return await asyncio.gather(*[result for _, result in entries])

    async def run(self):
        """Compute batches until the task is cancelled."""
        while True:
            await self._arrived.wait()
            batch = self._take()
            if not batch:
                self._arrived.clear()
                continue
            found = await to_thread.run_sync(self.compute, [item for item, _ in batch])
            for (_, result), value in zip(batch, found):
                if isinstance(value, Exception) and not result.done():
                    result.set_exception(value)
                elif not result.done():
                    result.set_result(value)

    def _take(self) -> list[tuple[Any, asyncio.Future]]:
        """Remove and return the next batch. Its items are of one kind."""
        batch: list[tuple[Any, asyncio.Future]] = []
        others: list[tuple[Any, asyncio.Future]] = []
        while self._entries and len(batch) < self.max_size:
            entry = self._entries.popleft()
            if not entry[1].done():
                (others if batch and entry[0].kind != batch[0][0].kind else batch).append(entry)
        self._entries.extendleft(reversed(others))
        return batch
