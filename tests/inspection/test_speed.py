"""Counted tokens and MACs, and speedups measured with a counting clock."""

import pytest
from counting_clock import MEDIAN, CountingClock

from modeling_trips.inspection import speed
from modeling_trips.inspection.speed import (
    CLOCKS,
    MIN_REPEATS,
    Setting,
    count_macs,
    measure,
    seconds_in_turns,
)


def setting(**changes) -> Setting:
    fields = {"texts_per_image": 1, "text_length": 6, "selection_layers": [2, 3], "keep_rate": 0.5, **changes}
    return Setting("tiny", 64, 2, attn_implementation="eager", clock="process", num_threads=1, **fields)


@pytest.mark.parametrize("mode", ["forward", "training", pytest.param("pretraining", marks=pytest.mark.slow)])
def test_times_are_medians_of_the_pruned_and_of_the_unpruned_model(mode, monkeypatch):
    monkeypatch.setitem(CLOCKS, "process", CountingClock(2))
    monkeypatch.setattr(speed, "peak_memory", CountingClock(2, [1]))
    row = measure(setting(mode=mode), warmup=1, repeats=5)
    pruned, unpruned = (count_macs(setting(mode=mode), rate) for rate in (0.5, 1.0))
    assert (row["latency"], row["unpruned_latency"]) == (MEDIAN * pruned, MEDIAN * unpruned)
    assert row["time_ratio"] == row["macs_ratio"] == pruned / unpruned != 1
    assert row["throughput"] == pytest.approx(2 / (MEDIAN * pruned))
    assert (row["peak_memory_bytes"], row["unpruned_peak_memory_bytes"]) == (pruned, unpruned)
    assert row["latency_p99"] is row["unpruned_latency_p99"] is None


def test_sharing_images_is_compared_with_repeating_them(monkeypatch):
    monkeypatch.setitem(CLOCKS, "process", CountingClock(3))
    row = measure(setting(texts_per_image=3), warmup=1, repeats=5)
    repeated = 3 * count_macs(setting(), 0.5)  # an image for each of the texts
    assert row["latency"] == MEDIAN * count_macs(setting(texts_per_image=3), 0.5)
    assert row["speedup_over_repeating_images"] == MEDIAN * repeated / row["latency"] > 1
    assert row["throughput"] == pytest.approx(6 / row["latency"])


def test_steps_alternate_within_the_limit():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = seconds_in_turns(
        steps, warmup=1, repeats=9, prepare=lambda name: order.append(f"before {name}"), limit=0
    )
    assert order == ["before a", "a", "before b", "b"] * (1 + MIN_REPEATS)
    assert [len(times) for times in seconds.values()] == [MIN_REPEATS] * 2
