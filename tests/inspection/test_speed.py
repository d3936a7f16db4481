"""Counted tokens and MACs, and speedups measured with a counting clock."""

import pytest
from counting_clock import MEDIAN, CountingClock

from modeling_trips.inspection import speed
from modeling_trips.inspection.speed import (
    Setting,
    count_macs,
    measure,
    seconds_in_turns,
)


def setting(**changes) -> Setting:
    fields = {"texts_per_image": 1, "text_length": 6, "selection_layers": [2, 3], "keep_rate": 0.5, **changes}
    return Setting("tiny", 64, 2, attn_implementation="eager", clock="process", **fields)


@pytest.mark.parametrize("mode, texts", [("forward", 3), ("training", 1)])
def test_times_are_medians_of_the_pruned_and_of_the_unpruned_model(mode, texts, monkeypatch):
    monkeypatch.setattr(speed, "timed", CountingClock(2))
    own = setting(mode=mode, texts_per_image=texts)
    row = measure(own, warmup=1, repeats=5)
    pruned, unpruned = (count_macs(own, rate) for rate in (0.5, 1.0))
    assert (row["latency"], row["unpruned_latency"]) == (MEDIAN * pruned, MEDIAN * unpruned)
    assert row["time_ratio"] == row["macs_ratio"] == pruned / unpruned != 1
    assert row["throughput"] == pytest.approx(2 * texts / (MEDIAN * pruned))


def test_steps_alternate():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = seconds_in_turns(steps, warmup=1, repeats=2, prepare=lambda: order.append("before"))
    assert order == ["before", "a", "before", "b"] * 3
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_processor_time_is_of_the_cpu_only():
    with pytest.raises(ValueError):
        setting(device="cuda")
