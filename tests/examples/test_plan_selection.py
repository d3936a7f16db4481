"""The script that plans a schedule: table, figure and errors."""

import re

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError

from modeling_trips import TripsConfig
from trips_examples.plan_selection import main


TINY = ["--preset", "tiny", "--text_length", "6"]


def test_the_table_has_the_named_schedules_and_the_model_s_own(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    plan = main([*TINY, "--texts_per_image", "1", "4", "--budget", "0.7", "0.9", "--num_rows=3", f"--plot={picture}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{len(plan.candidates)} candidates")
    assert lines[1].split() == "schedule mean tokens to fusion cost at 1 4 text(s) per image".split()
    for row, name in ((plan.cheapest, "cheapest"), (plan.most_tokens, "most tokens")):
        (line,) = [line for line in lines if line.endswith(name)]
        assert line.startswith(str(row.schedule))
        assert f"{row.ratios[1]:.3f}  {row.ratios[4]:.3f}" in line and f"{row.mean_tokens:.1f}" in line
    assert any(re.match(r"2:text:0\.5,3:text:0\.5 .* the model's own$", line) for line in lines)
    assert len(lines) <= 2 + 3 + 3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_is_planned_at_the_size_of_its_images(tmp_path):
    config = TripsConfig.from_preset("tiny", keep_rate=1.0)
    config.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--text_length=6"]
    assert main(arguments).unpruned.cost.tokens[-1] == 65
    assert main([*arguments, "--image_size=96"]).unpruned.cost.tokens[-1] == 145


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a --model or a --preset"),
        ([*TINY, "--image_size", "60"], "must be a multiple of `patch_size`"),
        ([*TINY, "--budget", "1.5"], "`budget`"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        main(arguments)


def test_the_cheapest_schedules_are_printed_where_none_fits(capsys):
    plan = main([*TINY, "--texts_per_image", "1", "4", "--budget", "0.1", "--num_rows=3"])
    assert plan.candidates and not plan.affordable
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == [str(row.schedule) for row in plan.candidates[:3]]
    costs = [max(row.ratios.values()) for row in plan.candidates]
    assert costs == sorted(costs)


@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_the_default_budget_fits_four_texts_of_an_image(preset):
    assert main(["--preset", preset, "--texts_per_image", "1", "4"]).affordable
