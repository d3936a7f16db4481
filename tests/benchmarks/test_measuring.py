"""`benchmarks/measuring.py`: rows have their provenance and are written one by one."""

import json

from measuring import OutputArguments, run_benchmark
from places import ROOT

from modeling_trips.inspection import provenance


def test_provenance_names_command_seed_and_machine(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "benchmark.py"), "--schedule", "2 text"])
    row = provenance("cpu", seed=7)
    assert row["command"] == "benchmarks/benchmark.py --schedule '2 text'"
    assert (row["seed"], row["num_threads"]) == (7, 1)
    assert row.keys() >= {"date", "device_name", "cpu_capability", "torch_version", "transformers_version"}


def test_rows_are_written_immediately_with_provenance(tmp_path):
    path = tmp_path / "rows.json"

    def measure(args):
        yield {"value": 1}
        assert [row["value"] for row in json.loads(path.read_text())] == [1]
        yield {"value": 2, "seed": 5}

    rows = run_benchmark(OutputArguments, "Test.", measure, lambda rows, args: None, [f"--output_json={path}"])
    assert json.loads(path.read_text()) == rows
    assert [(row["value"], row["seed"]) for row in rows] == [(1, None), (2, 5)]
    assert all(row["command"] and row["date"] for row in rows)
