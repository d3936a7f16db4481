"""The results of a run: the files, the few lines at the end, and the pictures."""

import pytest
from json_files import read_json
from loading import read, write
from PIL import Image
from toy_tasks import OPTIONS, write_task

from trips_examples import run_vqa
from trips_examples.training.pictures import plot_training
from trips_examples.training.results import beats_baseline


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train and evaluate with three questions about each image, and return the folder."""
    folder = tmp_path_factory.mktemp("run")
    write_task("vqa", folder)
    questions = {"what color is it?": None, "is it red?": "no", "is it a circle?": "no"}
    rows = [
        {**row, "question": text, "answer": answer or row["answer"]}
        for row in read(folder / "rows.jsonl")
        for text, answer in questions.items()
    ]
    file = write(folder / "rows.jsonl", rows)
    files = [f"--{split}_file={file}" for split in ("train", "validation", "test")]
    options = [
        "--schedule=2:text:0.3,3:text:0.3",
        "--max_steps=2",
        f"--output_dir={folder / 'out'}",
    ]
    run_vqa.main([*files, *OPTIONS, *options])
    return folder / "out"


def test_the_results_begin_with_what_matters(run):
    for split in ("eval", "test"):
        results = read_json(run / f"{split}_results.json")
        assert next(iter(results)) == "summary"
        summary = "\n".join(results["summary"])
        assert f"{results[f'{split}_accuracy']:.1%}" in summary and " 7 of 64 patches" in summary
        for what in ("text", "image"):
            assert f"({results[f'{split}_layer3_{what}_sensitivity']:.2f})" in summary
        assert (results["schedule"], results["precision"]) == ("2:text:0.3,3:text:0.3", "float32")
    results = read_json(run / "all_results.json")
    assert {"test_accuracy", "eval_accuracy", "train_loss"} <= results.keys()


def test_few_lines_are_printed_at_the_end(run, capsys):
    options = [f"--test_file={run.parent / 'rows.jsonl'}", f"--model={run}", f"--output_dir={run / 'again'}"]
    run_vqa.main([*options, "--do_train=False", "--do_eval=False", "--disable_tqdm=False"])
    printed = capsys.readouterr().out
    assert "exact_match" not in printed
    assert str(run / "again" / "test_results.json") in printed


def test_a_run_at_another_image_size_counts_the_patches_that_it_sees(run):
    options = [f"--test_file={run.parent / 'rows.jsonl'}", f"--model={run}", f"--output_dir={run / 'small'}"]
    run_vqa.main([*options, "--do_train=False", "--do_eval=False", "--image_size=32"])
    results = read_json(run / "small" / "test_results.json")
    assert any(f"{results['test_layer3_kept']:.0f} of 16 patches" in line for line in results["summary"])


def test_results_of_an_earlier_run_do_not_stay(run):
    options = [f"--train_file={run.parent / 'rows.jsonl'}", f"--output_dir={run}", "--overwrite_output_dir=True"]
    run_vqa.main([*options, *OPTIONS, "--max_steps=1", "--do_eval=False"])
    assert not any(name.startswith("test_") for name in read_json(run / "all_results.json"))


@pytest.mark.parametrize(
    "metrics, expected",
    [
        ({"accuracy": 0.1, "accuracy_mean_box": 0.0, "samples": 20}, False),  # two boxes by luck
        ({"accuracy": 0.35, "accuracy_majority": 0.33, "samples": 1000}, False),
        ({"accuracy": 0.45, "accuracy_majority": 0.33, "samples": 1000}, True),
        ({"cider": 2.0, "samples": 1000}, False),
    ],
)
def test_a_model_at_chance_gets_no_advice(metrics, expected):
    assert beats_baseline(metrics) == expected


@pytest.mark.parametrize("steps, panels", [([], 1), ([10, 10], 1), ([5, 10], 2)])
def test_evaluations_are_drawn_if_there_are_two(steps, panels, tmp_path):
    history = [{"step": step, "loss": 1 / step} for step in range(1, 11)]
    history += [{"step": step, "eval_accuracy": 0.5, "eval_loss": 1.0} for step in steps]
    plot_training(history, tmp_path / "training.png", unpruned_steps=5, majority=0.4)
    width, height = Image.open(tmp_path / "training.png").size
    assert width / height == pytest.approx(panels * 5 / 4, rel=0.01)
