"""`benchmarks/plan_scale.py`: costs from rows, and the columns worked by hand."""

import json

import plan_scale
import pytest


ROWS = [
    {"part": "memory", "images": 1000, "actor_cpu_seconds": 20.0},
    {"part": "memory", "images": 51_000, "actor_cpu_seconds": 270.0},
    {"part": "search", "rerank_50_cpu_ms": 300.0},
    {
        "part": "vectors",
        "vectors": 100_000,
        "build_cpu_ms": 40_000.0,
        "exact_cpu_ms": 20.0,
        "index_20_cpu_ms": 5.0,
        "table_bytes_per_vector": 1100.0,
        "index_bytes_per_vector": 40.0,
    },
]


def run(tmp_path, rows: list[dict], *options: str) -> list[dict[str, float]]:
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return plan_scale.main([f"--rows={tmp_path / 'rows.json'}", *options])


def test_a_collection_costs_what_its_images_cost(tmp_path, capsys):
    (column,) = run(tmp_path, ROWS, "--images", "3.6e8", "--rows_per_commit", "3.6e5", "--image_bytes", "1e5")
    assert column == pytest.approx(
        {
            "embedding, core hours": 500.0,  # 5 ms each, without the start of the actor
            "index, core hours": 40.0,
            "vectors on disk, GB": 396.0,
            "index, GB": 14.4,
            "images on disk, GB": 36_000.0,
            "ids to go on from, GB of memory": 11.52,
            "manifests that commits write, GB": 0.045,  # 1,000 commits
            "exact search, core ms per query": 72_000.0,
            "search by the index, core ms per query": 5.0,
            "ranking again, core ms per query": 300.0,
        }
    )
    printed = capsys.readouterr().out
    assert "| images | 360,000,000 |" in printed and "| embedding, core hours | 500 |" in printed


def test_what_was_not_measured_is_named(tmp_path):
    with pytest.raises(SystemExit, match="'vectors' was not measured"):
        run(tmp_path, ROWS[:-1])
    with pytest.raises(SystemExit, match="rerank_10_cpu_ms"):
        run(tmp_path, ROWS, "--rerank_k", "10")
