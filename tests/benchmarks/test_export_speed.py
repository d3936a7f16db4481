"""The benchmark of CPU runtimes: rows, agreement with PyTorch, and skipped runtimes."""

import json
import statistics

import export_speed
import pytest


TINY = ["--preset", "tiny", "--image_size", "64", "--schedule", "2,3", "--batch_size", "2", "--text_length", "6"]
ONCE = ["--warmup", "0", "--repeats", "2"]


def test_rows_for_all_tasks_and_backends(tmp_path, monkeypatch, capsys):
    path = tmp_path / "export.json"
    monkeypatch.setattr(export_speed, "find_spec", lambda name: None if name == "openvino" else name)
    ways = ["--ways", "eager-bf16", "openvino-fp32"]
    rows = export_speed.main([*TINY, *ONCE, *ways, "--texts_per_image", "1", "3", "--output_json", str(path)])
    assert json.loads(path.read_text()) == rows
    tasks = [(task, texts) for task in ("answer", "match", "features") for texts in (1, 3)]
    expected = [(*work, way) for work in tasks for way in ("eager-fp32", "eager-bf16")]
    assert [(row["task"], row["texts_per_image"], row["way"]) for row in rows] == expected
    for row, other in zip(rows[::2], rows[1::2]):
        assert (row["speedup"], row["same_results"], row["same_patches"]) == (1, 1, 1)
        assert other["speedup"] == pytest.approx(row["latency"] / other["latency"])
        assert 0.8 < other["same_patches"] <= 1
        assert row["throughput"] == pytest.approx(2 * row["texts_per_image"] / row["latency"])
    assert "openvino-fp32" in capsys.readouterr().out


@pytest.mark.slow
def test_all_backends_run_and_exports_are_reused(tmp_path, monkeypatch):
    options = [*TINY, *ONCE, "--task", "answer", "--export_dir", str(tmp_path)]
    rows = export_speed.main(options)
    assert {row["way"] for row in rows} == set(export_speed.WAYS)
    assert all(row["same_patches"] == 1 for row in rows if row["way"].endswith("fp32"))
    assert statistics.mean(row["same_patches"] for row in rows) > 0.95
    monkeypatch.setattr(export_speed, "export_model", None)  # not called again
    ways = ["--ways", *export_speed.EXPORTED]
    assert len(export_speed.main([*options, *ways])) == 1 + 6
