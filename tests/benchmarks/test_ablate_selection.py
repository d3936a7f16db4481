"""`benchmarks/ablate_selection.py`: variants train once and are compared; evaluations describe what is kept."""

import json

import ablate_selection
import pytest
from json_files import read_json
from toy_tasks import OPTIONS, write_task

from trips_examples import run_grounding


def test_an_evaluation_describes_what_each_selection_layer_keeps(tmp_path):
    run = tmp_path / "run"
    options = ["--schedule=3:text:0.25", "--do_train=False", f"--output_dir={run}"]
    run_grounding.main([*write_task("grounding", tmp_path), *OPTIONS, *options])
    metrics = read_json(run / "eval_results.json")
    for name in ("kept", "entropy", "region_recall"):
        assert f"eval_layer3_{name}" in metrics
    assert 0.25 <= metrics["eval_layer3_coverage"] <= 1
    assert 0 <= metrics["eval_layer3_patch_precision"] <= 1
    assert metrics["eval_patch_precision_at_random"] == pytest.approx(40 * 40 / (120 * 60))


@pytest.fixture
def arguments(tmp_path):
    data = write_task("grounding", tmp_path)
    variants = {"text": "--schedule 2:text:0.1", "unpruned": "--schedule unpruned"}
    (tmp_path / "variants.json").write_text(json.dumps(variants))
    options = f"--script=run_grounding.py --metric=eval_mean_iou --variants_file={tmp_path / 'variants.json'}"
    folders = [f"--output_dir={tmp_path / 'runs'}", f"--output_json={tmp_path / 'rows.json'}"]
    return [*options.split(), "--seeds=3", *folders, "--", *data, *OPTIONS, "--schedule=3:text:0.5"]


@pytest.mark.slow
def test_each_variant_trains_once_and_is_compared(arguments, tmp_path):
    rows = ablate_selection.main([*arguments, "--max_steps=1"])
    assert read_json(tmp_path / "rows.json") == rows
    assert [(row["variant"], row["seed"]) for row in rows] == [("text", 3), ("unpruned", 3)]
    assert all(row["command"].startswith("examples/run_grounding.py ") for row in rows)
    assert "eval_layer2_entropy" in rows[0]  # the variant wins
    assert "eval_layer2_entropy" not in rows[1]
    model = tmp_path / "runs" / "text-seed3" / "model.safetensors"
    before = model.stat().st_mtime_ns
    assert ablate_selection.main([*arguments, "--max_steps=1"]) == rows
    assert model.stat().st_mtime_ns == before
    with pytest.raises(ValueError):  # the folder holds runs with other options
        ablate_selection.main([*arguments, "--max_steps=2"])


def test_the_table_has_means_and_deviations_over_the_seeds(capsys):
    rows = [
        {"variant": "text", "score": 0.5, "minutes": 1.5},
        {"variant": "text", "score": 0.7, "minutes": 2.1},
        {"variant": "text", "score": 0.9, "minutes": 2.7},
        {"variant": "unpruned", "score": 0.8, "minutes": 4},
    ]
    args = ablate_selection.AblationArguments(metric="score")
    ablate_selection.print_table(rows, args)
    *_, text, unpruned = capsys.readouterr().out.splitlines()
    assert text == "| text | 0.7000 | 0.2000 | 3 | 2.1 |"
    assert unpruned == "| unpruned | 0.8000 | - | 1 | 4.0 |"


def test_variants_come_from_a_file(tmp_path):
    path = tmp_path / "variants.json"
    variants = {
        "text 0.25": "--schedule 2:text:0.25",
        "late": "--schedule 3:text:0.1",
        "own": "--start {seed}",
    }
    path.write_text(json.dumps(variants))
    args = ablate_selection.AblationArguments(variants_file=str(path), seeds=[1], output_dir="runs")
    text, late, own = ablate_selection.make_runs(args, ["--max_steps=1"])
    assert text.variant == "text 0.25"
    assert text.folder.name == "text-0.25-seed1"
    assert late.options == ("run_vqa.py", "--max_steps=1", "--schedule", "3:text:0.1", "--seed", "1")
    assert own.options[-4:] == ("--start", "1", "--seed", "1")
    path.write_text('{"text": ["--schedule", "2:text:0.25"]}')
    with pytest.raises(ValueError, match="variants.json"):
        ablate_selection.make_runs(args, [])
