"""`benchmarks/report_hardware.py`: rows of several machines on one page; what is wrong with a row is named."""

import json
from pathlib import Path

import benchmark
import pytest
import report_hardware
from places import ROOT


ROWS = json.loads((ROOT / "docs/results/hardware/intel_xeon_2_threads.json").read_text())


def write(folder: Path, name: str, *rows: dict):
    (folder / name).write_text(json.dumps(rows))


def test_the_page_is_that_of_the_rows():
    assert (ROOT / "docs/hardware.md").read_text() == report_hardware.render(report_hardware.SCHEMA.parent)


def test_what_the_benchmark_writes_stands_beside_what_others_sent(tmp_path):
    command = "--preset tiny --image_size 64 --schedule 3 --batch_size 1 --text_length 6 --repeats 1 --warmup 0"
    (row,) = benchmark.main([*command.split(), "--output_json", str(tmp_path / "mine.json")])
    gpu = {
        **row,
        "device": "cuda",
        "device_name": "A GPU",
        "dtype": "bfloat16",
        "time_ratio": 0.5,
        "throughput": 1234.5,
    }
    other = {**gpu, "batch_size": 64, "time_ratio": 0.25}
    write(tmp_path, "gpu.json", gpu, other)
    report_hardware.main(["--folder", str(tmp_path), "--output", str(tmp_path / "page.md")])
    lines = (tmp_path / "page.md").read_text().splitlines()
    (head,) = [line for line in lines if line.startswith("| what")]
    mine = f"{row['device_name']}, {row['num_threads']} thread{'s' * (row['num_threads'] > 1)}, float32"
    assert sorted(cell.strip() for cell in head.split("|")[4:-1]) == sorted(["A GPU, bfloat16", mine])
    (both,) = [line for line in lines if "64 px, batch 1 x" in line]
    assert "| 0.50 (1,234.5) |" in both and f"| {row['time_ratio']:.2f} ({row['throughput']:,.1f}) |" in both
    (one,) = [line for line in lines if "64 px, batch 64 x" in line]
    assert "| 0.25 (1,234.5) |" in one and "|  |" in one
    assert any("[gpu.json](results/hardware/gpu.json)" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_ratio": 0}, r"sent.json\[1\]\['time_ratio'\]: 0 is less than or equal to the minimum of 0"),
        ({"dtype": "float8"}, r"sent.json\[1\]\['dtype'\]: 'float8' is not one of"),
        ({"selection_guidance": ["text", "words"]}, r"sent.json\[1\]\['selection_guidance'\]: "),
        ({"device_name": ...}, r"sent.json\[1\]: 'device_name' is a required property"),
    ],
)
def test_a_row_that_the_schema_does_not_allow_is_named(changes, message, tmp_path):
    row = {name: value for name, value in {**ROWS[1], **changes}.items() if value is not ...}
    write(tmp_path, "sent.json", ROWS[0], row)
    with pytest.raises(ValueError, match=message):
        report_hardware.render(tmp_path)


def test_the_same_twice_and_nothing_at_all_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no rows"):
        report_hardware.render(tmp_path)
    write(tmp_path, "a.json", ROWS[0])
    write(tmp_path, "b.json", ROWS[0])
    with pytest.raises(ValueError, match="b.json: Intel Xeon, 2 threads, float32 did this before: base, forward"):
        report_hardware.render(tmp_path)
