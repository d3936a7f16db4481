"""Measuring: rows have their provenance and are written one by one."""

import json
import subprocess

import pytest
from measuring import OutputArguments, TimingArguments, check_choices, run_benchmark
from places import ROOT

from modeling_trips.inspection import provenance
from modeling_trips.inspection.speed import CLOCKS


def test_provenance_names_command_commit_seed_and_machine(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "benchmark.py"), "--schedule", "2 text"])
    row = provenance("cpu", seed=7)
    assert row["command"] == "benchmarks/benchmark.py --schedule '2 text'"
    assert (row["seed"], row["num_threads"]) == (7, 1)
    assert row.keys() >= {
        "date",
        "device_name",
        "machine",
        "cpu_capability",
        "python_version",
        "torch_version",
        "transformers_version",
    }
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert row["git_commit"].removesuffix("-dirty") == head.stdout.strip()


def test_rows_are_written_immediately_with_provenance(tmp_path):
    path = tmp_path / "rows.json"

    def measure(args):
        yield {"value": 1}
        assert [row["value"] for row in json.loads(path.read_text())] == [1]
        yield {"value": 2, "seed": 5}

    reported = []
    rows = run_benchmark(
        OutputArguments, "Test.", measure, lambda rows, args: reported.extend(rows), [f"--output_json={path}"]
    )
    assert json.loads(path.read_text()) == rows == reported
    assert [(row["value"], row["seed"]) for row in rows] == [(1, None), (2, 5)]
    assert all(row["command"] and row["date"] for row in rows)


def test_ratios_compare_the_same_round(monkeypatch):
    seconds = iter([9.0, 9.0, 2.0, 1.0, 4.0, 2.0, 9.0, 4.5])
    monkeypatch.setitem(CLOCKS, "wall", lambda step, device: next(seconds))
    prepared = []
    rows = TimingArguments(warmup=1, repeats=3).time_in_turns(
        {"base": lambda: None, "half": lambda: None}, prepare=prepared.append
    )
    assert (rows["base"]["latency"], rows["half"]["latency"]) == (4.0, 2.0)
    assert (rows["half"]["speedup"], rows["half"]["time_ratio_quartiles"]) == (2.0, [0.5, 0.5])
    assert prepared[:8] == ["base", "half"] * 4


def test_unknown_choices_raise():
    check_choices("--task", ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="--task.*c"):
        check_choices("--task", ["a", "c"], ["a", "b"])
    with pytest.raises(ValueError, match="--clock"):
        TimingArguments(clock="process", device="cuda")
