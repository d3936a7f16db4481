"""`benchmarks/measuring.py`: rows have their provenance and are written one by one."""

from json_files import read_json
from measuring import OutputArguments, run_benchmark
from places import ROOT


def test_rows_are_written_immediately_with_provenance(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "benchmark.py"), "--schedule", "2 text"])
    path = tmp_path / "rows.json"

    def measure(args):
        yield {"value": 1}
        assert [row["value"] for row in read_json(path)] == [1]
        yield {"value": 2, "seed": 5}

    rows = run_benchmark(OutputArguments, "Test.", measure, lambda rows, args: None, [f"--output_json={path}"])
    assert read_json(path) == rows
    first, second = rows
    assert first["seed"] is None
    assert second["seed"] == 5
    for row in rows:
        assert row["command"] == "benchmarks/benchmark.py --schedule '2 text'"
        assert row.keys() >= {"date", "device_name", "cpu_capability", "torch_version", "transformers_version"}
