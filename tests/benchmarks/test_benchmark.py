"""Rows and output of the benchmark."""

import json

import benchmark
import pytest
from benchmark import Setting, count_macs, measure
from json_files import read_json


def test_a_schedule_has_a_guidance_and_a_rate_per_layer(tmp_path, capsys):
    path = tmp_path / "speed.json"
    fields = {"projection_dim": 64}
    schedules = ["2:image:0.5,4:text:0.25", "3:image:0.5,4:text:0.5"]
    options = (
        "--preset tiny --image_size 64 --batch_size 1 --text_length 6 --texts_per_image 1 3 --repeats 1 --warmup 0"
    )
    files = [f"--output_json={path}", f"--config_fields={json.dumps(fields)}"]
    benchmark.main(["--schedule", *schedules, *options.split(), *files])
    rows = read_json(path)
    assert [row["schedule"] for row in rows] == schedules * 2
    assert [row["texts_per_image"] for row in rows] == [1, 1, 3, 3]
    assert rows[0]["tokens_per_layer"] == [65, 34, 34, 11]
    for row in rows:
        assert row["config_fields"] == fields
        assert row["time_ratio"] == pytest.approx(row["latency"] / row["unpruned_latency"])
        assert row["throughput"] == pytest.approx(row["texts_per_image"] / row["latency"])
    assert "3 texts, 2:image:0.5,4:text:0.25" in capsys.readouterr().out


def setting(**changes):
    fields = {"texts_per_image": 1, "text_length": 6, "schedule": "2:text:0.5,3:text:0.5", **changes}
    return Setting("tiny", 64, 2, attn_implementation="eager", clock="process", **fields)


@pytest.mark.parametrize("mode, texts", [("forward", 3), ("training", 1)])
def test_a_row_has_the_ratios_of_its_times_and_macs(mode, texts):
    own = setting(mode=mode, texts_per_image=texts)
    row = measure(own, warmup=1, repeats=3)
    assert row["time_ratio"] == row["latency"] / row["unpruned_latency"]
    assert row["macs_ratio"] == count_macs(own, own.schedule) / count_macs(own, "unpruned") != 1
    assert row["throughput"] == pytest.approx(2 * texts / row["latency"])


def test_processor_time_is_of_the_cpu_only():
    with pytest.raises(ValueError):
        setting(device="cuda")
