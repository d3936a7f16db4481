"""Rows of `benchmarks/index_and_search.py`."""

import json

import index_and_search
import pytest
from tiny_collection import save_model

from modeling_trips.inspection.speed import CLOCKS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def run(checkpoint: str, folder, *options: str) -> list[dict]:
    output = folder / "rows.json"
    words = [f"--model={checkpoint}", f"--work_dir={folder}", f"--output_json={output}", *options]
    rows = index_and_search.main(words)
    assert json.loads(output.read_text()) == rows
    return rows


def test_index_is_compared_with_exact_search(checkpoint, tmp_path):
    options = ["--num_vectors", "3000", "--dim", "32", "--queries", "8", "--probes", "1", "1000"]
    (row,) = run(checkpoint, tmp_path, "--parts", "vectors", *options)
    assert 0 < row["recall_at_50_of_1_probes"] <= row["recall_at_50_of_1000_probes"] <= 1
    assert row["recall_at_50_of_1000_probes"] > 0.8
    assert row["table_bytes_per_vector"] > 4 * 32 and 4 < row["index_bytes_per_vector"] < 4 * 32
    assert all(row[f"{name}_cpu_ms"] > 0 for name in ("build", "exact", "index_1", "index_1000"))


def test_share_found():
    assert index_and_search.share_found(["a", "b", "c", "d"], ["d", "a", "x", "y"]) == 0.5
    assert index_and_search.share_found(["a", "b", "c", "d"], ["d", "a"]) == 0.5


def test_timer_medians_of_both_clocks(monkeypatch):
    seconds = {"wall": [3, 1, 2], "process": [60, 20, 50]}
    for name, of_clock in seconds.items():
        monkeypatch.setitem(CLOCKS, name, lambda step, device, of_clock=of_clock: (step(), of_clock.pop(0))[1])
    timer = index_and_search.Timer()
    assert [timer("step", lambda number=number: number) for number in range(3)] == [0, 1, 2]
    assert timer.medians == {"step_ms": 2000, "step_cpu_ms": 50_000}


@pytest.mark.slow
def test_all_parts_make_rows(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_worker_niceness", "0")
    sizes = ["--memory_images", "300", "900", "--actor_images", "1000", "--rounds", "1", "--scenes", "300"]
    sizes += ["--queries", "20", "--num_vectors", "1000", "--rerank_k", "5", "50", "--rows_per_commit", "100"]
    rows = run(checkpoint, tmp_path, *sizes)
    parts = [row["part"] for row in rows]
    assert parts == ["actors", "actors", "memory", "memory", "search", "vectors"]
    assert [row["images"] for row in rows[:4]] == [1000, 1000, 300, 900]
    assert all(row["peak_mb"] > 100 and row["images_per_second"] > 0 for row in rows[:4])
    search = rows[4]
    assert search["images"] == 300 and 0 < search["index_recall_at_50"] <= 1
    assert all(0 <= search[f"r1_{name}"] <= 1 for name in ("by_features", "reranked_5", "reranked_50"))
