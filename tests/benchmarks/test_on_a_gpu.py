"""The measurements for a GPU run on a CPU with tiny shapes, and what does not work is a row."""

import importlib.util
import json

import on_a_gpu
import pytest


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_all_parts_give_rows_without_a_gpu_and_without_vllm(tmp_path, capsys):
    path = tmp_path / "rows.json"
    kinds = ["--kinds", "sdpa", "flash_attention_2"]
    on_a_gpu.main(["--device=cpu", "--tiny=True", *kinds, f"--output_json={path}"])
    rows = json.loads(path.read_text())
    for row in rows:
        assert {"command", "git_commit", "device_name", "part"} <= row.keys()

    steps = [row for row in rows if row["part"] == "encoder" and row["kind"] == "sdpa"]
    assert [(row["mode"], row["texts_per_image"]) for row in steps] == [
        ("forward", 1),
        ("forward", 5),
        ("training", 1),
        ("training", 5),
    ]
    for row in steps:
        assert row["time_ratio"] > 0
        assert row["macs_ratio"] < 1
        assert "error" not in row

    missing = {(row["part"], row.get("kind")) for row in rows if "error" in row}
    assert missing == {("encoder", "flash_attention_2"), ("tokens", None), ("speed", None)}
    printed = capsys.readouterr()
    assert "vLLM is not installed" in printed.err
    assert "time_ratio" in printed.out


def test_without_a_gpu_it_says_what_to_type():
    if on_a_gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="--device cpu"):
        on_a_gpu.main([])
