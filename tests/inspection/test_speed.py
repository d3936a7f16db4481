"""Counted MACs, and steps that are timed in turns."""

import pytest

from modeling_trips.inspection.speed import (
    Setting,
    count_macs,
    measure,
    seconds_in_turns,
)


def setting(**changes) -> Setting:
    fields = {"texts_per_image": 1, "text_length": 6, "schedule": "2:text:0.5,3:text:0.5", **changes}
    return Setting("tiny", 64, 2, attn_implementation="eager", clock="process", **fields)


@pytest.mark.parametrize("mode, texts", [("forward", 3), ("training", 1)])
def test_a_row_has_the_ratios_of_its_times_and_macs(mode, texts):
    own = setting(mode=mode, texts_per_image=texts)
    row = measure(own, warmup=1, repeats=3)
    assert row["time_ratio"] == row["latency"] / row["unpruned_latency"]
    assert row["macs_ratio"] == count_macs(own, own.schedule) / count_macs(own, "unpruned") != 1
    assert row["throughput"] == pytest.approx(2 * texts / row["latency"])


def test_steps_alternate():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = seconds_in_turns(steps, warmup=1, repeats=2, prepare=lambda: order.append("before"))
    assert order == ["before", "a", "before", "b"] * 3
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_processor_time_is_of_the_cpu_only():
    with pytest.raises(ValueError):
        setting(device="cuda")
