"""The table of one machine: tiny models on the CPU, what is written, going on, what is too large or too late."""

import json

import device_table
import peers
import pytest
import torch
from report_hardware import read_rows


OPTIONS = """--device cpu --dtype float32 --preset tiny --image_size 64 --batch_size 1 2 --texts_per_image 1 3
--schedule 2:text:0.05 --tower_schedule 2:image --repeats 5""".split()


def names(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["cell"] for row in rows))


@pytest.fixture
def trips_alone(monkeypatch):
    """Without compiling and without base models, which take most of the time; test_peers.py has them."""
    monkeypatch.setattr(torch, "compile", lambda model, mode=None: model)
    monkeypatch.setattr(peers, "is_installed", lambda name, packages: False)


def test_rows_table_and_picture_are_written_and_nothing_is_measured_twice(tmp_path, monkeypatch, trips_alone):
    device_table.main([*OPTIONS, "--output_dir", str(tmp_path)])
    twins = read_rows(tmp_path / "twins.json")  # as the schema of machines allows
    assert names(twins)[:3] == [
        "forward, batch 1 x 1, 2:text:0.05",
        "forward, compiled, batch 1 x 1, 2:text:0.05",
        "training, batch 1 x 1, 2:text:0.05",
    ]
    assert len(twins) == 2 * 2 * 2 + 2  # batches, texts, modes; compiled forward steps of one text
    assert [row["compile"] for row in twins[:3]] == [False, True, False]
    others = json.loads((tmp_path / "peers.json").read_text())
    assert names(others) == [
        *(f"{task}, batch {batch} x {texts}" for task in ("answer", "match") for batch in (1, 2) for texts in (1, 3)),
        *(f"tower, batch {batch} x 1" for batch in (1, 2)),
    ]
    by_size = {(row["batch_size"], row["texts_per_image"]): row for row in others if row["task"] == "answer"}
    for (batch, texts), row in by_size.items():
        assert row["throughput"] == pytest.approx(batch * texts / row["latency"])
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {name} |" in table for name in names(twins + others))
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(device_table, "measure", lambda *args, **options: pytest.fail("measured again"))
    device_table.main([*OPTIONS, "--output_dir", str(tmp_path)])
    assert read_rows(tmp_path / "twins.json") == twins


def test_what_finds_no_memory_is_named_and_not_tried_again(tmp_path):
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    args = device_table.DeviceTableArguments(str(tmp_path), device="cpu")
    cells = [
        device_table.Cell("large", "twins.json", too_large),
        device_table.Cell("small", "twins.json", lambda: [{"latency": 1.0}]),
    ]
    assert device_table.run(cells, args) == []
    assert json.loads((tmp_path / "out_of_memory.json").read_text()) == ["large"]
    assert json.loads((tmp_path / "twins.json").read_text()) == [{"cell": "small", "latency": 1.0}]
    assert device_table.run([device_table.Cell("all left out", "peers.json", lambda: [])], args) == []
    assert json.loads((tmp_path / "out_of_memory.json").read_text()) == ["large", "all left out"]
    again = [device_table.Cell("large", "twins.json", lambda: pytest.fail("tried again"))]
    assert device_table.run(again, args) == []


def test_what_is_left_when_the_minutes_are_over_is_named(tmp_path):
    args = device_table.DeviceTableArguments(str(tmp_path), device="cpu", minutes=0)
    cells = [device_table.Cell("late", "twins.json", lambda: pytest.fail("too late"))]
    assert device_table.run(cells, args) == ["late"]
    assert not (tmp_path / "twins.json").exists()


def test_without_time_for_anything_that_is_said(tmp_path, capsys):
    device_table.main([*OPTIONS, "--output_dir", str(tmp_path), "--minutes", "0"])
    assert "Not measured within 0 minutes, 20: forward, batch 1 x 1" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
