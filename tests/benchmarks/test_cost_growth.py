"""How the cost grows: what is counted, what is measured, and the law between them."""

import json

import cost_growth
import pytest
from counting_clock import MEDIAN, CountingClock

from modeling_trips.inspection.speed import CLOCKS, count_macs


TINY = (
    "--preset tiny --image_size 64 --text_length 8 --image_sizes 32 64 --text_lengths 8 --batch_sizes 1 8 "
    "--texts_per_image 1 4 --schedule 2,3 3:image:0.7,4:text:0.3 --repeats 1"
).split()


def test_counts_are_those_of_the_model_that_runs():
    (args,) = cost_growth.make_parser(cost_growth.GrowthArguments, description="").parse_args_into_dataclasses(
        args=TINY
    )
    points = cost_growth.settings_of(args)
    assert len(points) == 2 * (2 + 1 + 2 + 2)
    for _, schedule, setting in points:
        assert cost_growth.count(setting, schedule) == count_macs(setting, setting.keep_rate)
        assert cost_growth.count(setting, cost_growth.UNPRUNED) == count_macs(setting, 1.0)


def test_times_are_medians_of_the_pruned_and_of_the_unpruned_model(monkeypatch):
    parser = cost_growth.make_parser(cost_growth.GrowthArguments, description="")
    (args,) = parser.parse_args_into_dataclasses(args=[*TINY, "--repeats=5", "--clock=process"])
    monkeypatch.setitem(CLOCKS, "process", CountingClock(2))
    row = cost_growth.examine(*cost_growth.settings_of(args)[0], args)
    assert (row["latency"], row["unpruned_latency"]) == (MEDIAN * row["macs"], MEDIAN * row["unpruned_macs"])


def test_the_law_is_found_in_points_that_follow_it():
    macs = [1e9, 2e9, 5e9]
    rows = [
        {"macs": m, "latency": 0.5 + m / 4e9, "unpruned_macs": 2 * m, "unpruned_latency": 0.5 + m / 2e9} for m in macs
    ]
    not_measured = {"macs": 9e9, "latency": None, "unpruned_macs": 9e9, "unpruned_latency": None}
    assert cost_growth.fit_law([*rows, not_measured]) == pytest.approx((0.5, 4e9, 1.0))


def test_what_costs_too_much_is_counted_only(tmp_path):
    path, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    cost_growth.main([*TINY, "--max_gmacs", "0.2", "--output_json", str(path), "--plot", str(plot)])
    rows = json.loads(path.read_text())
    assert {row["latency"] is None for row in rows} == {True, False}
    assert all((row["latency"] is None) == (row["unpruned_macs"] > 0.2e9) for row in rows)
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="raise --max_gmacs"):
        cost_growth.main([*TINY, "--max_gmacs", "0.001"])
