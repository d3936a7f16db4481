"""Rows and output of the benchmark."""

import json

import benchmark
import pytest


def test_a_schedule_has_a_guidance_and_a_rate_per_layer(tmp_path, capsys):
    path = tmp_path / "speed.json"
    fields = {"projection_dim": 64}
    schedules = ["2:image:0.5,4:text:0.25", "3:image:0.5,4:text:0.5"]
    options = (
        "--preset tiny --image_size 64 --batch_size 1 --text_length 6 --texts_per_image 1 3 --repeats 1 --warmup 0"
    )
    files = [f"--output_json={path}", f"--config_fields={json.dumps(fields)}"]
    benchmark.main(["--schedule", *schedules, *options.split(), *files])
    rows = json.loads(path.read_text())
    assert [row["schedule"] for row in rows] == schedules * 2
    assert [row["texts_per_image"] for row in rows] == [1, 1, 3, 3]
    assert rows[0]["tokens_per_layer"] == [65, 34, 34, 11]
    for row in rows:
        assert row["config_fields"] == fields
        assert row["time_ratio"] == pytest.approx(row["latency"] / row["unpruned_latency"])
        assert row["throughput"] == pytest.approx(row["texts_per_image"] / row["latency"])
    assert "3 texts, 2:image:0.5,4:text:0.25" in capsys.readouterr().out
