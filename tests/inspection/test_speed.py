"""Steps that are timed in turns."""

from modeling_trips.inspection.speed import seconds_in_turns


def test_steps_alternate():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = seconds_in_turns(steps, warmup=1, repeats=2, prepare=lambda: order.append("before"))
    assert order == ["before", "a", "before", "b"] * 3
    assert [len(times) for times in seconds.values()] == [2, 2]
