"""Batches of items from many requests."""

import asyncio
import threading
from dataclasses import dataclass

import pytest


pytest.importorskip("granian")

from trips_serving.batching import Batcher  # noqa: E402


@dataclass
class Number:
    value: int
    kind: str = "a"


def run(compute, max_size: int, requests):
    """Return the results of `requests(batcher)`."""

    async def main():
        batcher = Batcher(compute, max_size)
        running = asyncio.create_task(batcher.run())
        try:
            return await requests(batcher)
        finally:
            running.cancel()

    return asyncio.run(main())


def test_requests_get_their_results_in_batches_of_one_kind():
    batches = []

    def compute(items: list[Number]) -> list[int]:
        batches.append(items)
        return [item.value**2 for item in items]

    async def requests(batcher: Batcher):
        asked = [[Number(3 * row + column, "ab"[row % 2]) for column in range(3)] for row in range(8)]
        return await asyncio.gather(*[batcher.submit(items) for items in asked])

    found = run(compute, 4, requests)
    assert [value for row in found for value in row] == [value**2 for value in range(24)]
    assert all(len(batch) <= 4 and len({item.kind for item in batch}) == 1 for batch in batches)
    assert len(batches) == 6


def test_failed_item_fails_its_request_alone():
    async def requests(batcher: Batcher):
        asked = [[Number(1), Number(0)], [Number(2)]]
        return await asyncio.gather(*[batcher.submit(items) for items in asked], return_exceptions=True)

    failed, answered = run(lambda items: [item.value or ValueError("zero") for item in items], 10, requests)
    assert isinstance(failed, ValueError) and answered == [2]


def test_cancelled_request_is_not_computed():
    computed, release = [], threading.Event()

    def compute(items: list[Number]) -> list[int]:
        release.wait(10)
        computed.extend(item.value for item in items)
        return computed[-len(items) :]

    async def requests(batcher: Batcher):
        tasks = [asyncio.create_task(batcher.submit([Number(value)])) for value in range(3)]
        await asyncio.sleep(0.1)  # item 0 is being computed
        tasks[1].cancel()
        release.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, cancelled, last = run(compute, 1, requests)
    assert (first, last) == ([0], [2]) and isinstance(cancelled, asyncio.CancelledError)
    assert computed == [0, 2]
