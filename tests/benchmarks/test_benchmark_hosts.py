"""The benchmark of patched models: MACs against a formula, and models of base size."""

import time

import benchmark_hosts
import pytest
from tiny_hosts import make_timm

from modeling_trips.inspection.speed import processor_time


@pytest.mark.parametrize("clock", ["wall", "process"])
def test_the_benchmark_counts_what_a_formula_says(monkeypatch, tmp_path, clock):
    """A ViT of width 32 with 17 tokens keeps 14 after layer 1 and 12 after layer 2."""
    case = benchmark_hosts.Case(
        lambda image_size: make_timm(img_size=image_size), selection_layers=(1, 2), takes_text=False
    )
    monkeypatch.setitem(benchmark_hosts.CASES, "tiny", case)
    path = tmp_path / "hosts.json"
    options = f"--hosts tiny --image_size 32 --repeats 2 --clock {clock}".split()
    (row,) = benchmark_hosts.main([*options, "--output_json", str(path)])
    d, mlp = 32, 128

    def macs(tokens: list[tuple[int, int]]) -> int:
        layers = sum(4 * n * d * d + 2 * n * n * d + 2 * m * d * mlp for n, m in tokens)
        # Each selection: the query of [CLS], its product with the weight of the keys, for two heads the products with
        # n - 1 candidates, and the weighted sum.
        selection = sum(2 * d * d + 2 * (n - 1) * d + (n - 1) * d for n, m in tokens if n != m)
        return 16 * 3 * 8 * 8 * d + layers + selection + 5 * d

    assert row["unpruned_macs"] == 2 * macs([(17, 17)] * 3)
    assert row["macs"] == 2 * macs([(17, 14), (14, 12), (12, 12)])
    assert (row["unpruned_image_tokens"], row["image_tokens"]) == (17, 12)
    assert row["time_ratio"] == pytest.approx(row["latency"] / row["unpruned_latency"])
    assert path.exists()
    with pytest.raises(ValueError, match="--hosts.*word2vec"):
        benchmark_hosts.main(["--hosts", "word2vec"])


def test_cpu_time_excludes_waiting():
    assert processor_time(lambda: time.sleep(0.2), "cpu") < 0.1
    assert processor_time(lambda: sum(range(10**6)), "cpu") > 0
