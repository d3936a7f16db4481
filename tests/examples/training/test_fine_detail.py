"""Small things, with and without pruning: which they are, what is compared, and what is said of it."""

import json

import PIL.Image
import pytest
from toy_tasks import OPTIONS

from trips_examples import run_grounding
from trips_examples.analysis.comparison import Group
from trips_examples.training.fine_detail import small_things
from trips_examples.training.health import costs_detail


def group(lost: int, won: int, p_value: float) -> Group:
    return Group("all", "", 80, 0.5, 0.5 + (lost - won) / 80, lost, won, p_value, p_value)


def test_small_is_up_to_a_sixteenth_of_the_image():
    image = PIL.Image.new("RGB", (80, 40))
    boxes = [[0, 0, 20, 10], [0, 0, 20, 10.1], None, [70, 30, 80, 40]]
    rows = [{"image": image, "region": box} for box in boxes]
    assert small_things(rows) == [rows[0], rows[3]]
    assert small_things([{"image": image, "question": "what is it?"}]) == []


def test_it_is_said_where_the_unpruned_model_is_ahead_beyond_chance():
    (finding,) = costs_detail(group(lost=20, won=4, p_value=0.0015))
    assert finding.kind == "fine detail"
    assert "of 80 texts about something of at most 1/16 of the image, 50.0% come out right, and 70.0%" in finding.words
    assert "once in 667 times" in finding.words and "--keep_rate" in finding.words


@pytest.mark.parametrize(("lost", "won", "p_value"), [(4, 20, 0.0015), (6, 4, 0.75), (0, 0, 1.0)])
def test_nothing_is_said_where_it_is_behind_or_ahead_by_chance(lost, won, p_value):
    assert [*costs_detail(group(lost, won, p_value))] == []


def test_boxes_are_compared_from_half_of_a_training_on(tmp_path):
    rows = []
    for number in range(4):
        image, box = PIL.Image.new("RGB", (64, 64), "gray"), [8 * number, 8, 8 * number + 8, 16]
        image.paste("red", box)
        image.save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "expression": "the red square", "box": box}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = [f"--{split}_file={tmp_path / 'rows.jsonl'}" for split in ("train", "validation")]
    steps = ["--max_steps=4", "--health_steps=1", "--do_eval=False", f"--output_dir={tmp_path / 'run'}"]
    run_grounding.main([*data, *OPTIONS, *steps, "--selection_layers=2", "--keep_rate=0.5"])
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "selection_small_accuracy" in entry]
    assert [entry["step"] for entry in logged] == [2, 3, 4]
    assert all(0 <= entry["selection_small_accuracy_unpruned"] <= 1 for entry in logged)
