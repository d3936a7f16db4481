"""The script that counts and proposes schedules."""

import pytest

from modeling_trips import TripsConfig
from trips_examples.plan_selection import main


TINY = ["--preset", "tiny", "--text_length", "6"]


def test_a_given_schedule_is_counted(capsys, tmp_path):
    TripsConfig.from_preset("tiny", keep_rate=1.0).save_pretrained(tmp_path)
    given = ["--model", str(tmp_path), "--text_length=6", "--schedule", "2:text:0.1", "2:text:0.5"]
    few, half = main([*given, "--texts_per_image", "1", "4"])
    assert (few.cost.tokens[-1], half.cost.tokens[-1]) == (1 + 7 + 1, 1 + 32 + 1)  # of 64 patches
    assert few.ratio < half.ratio
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["2:text:0.1", f"{few.mean_tokens:.1f}", "9", *(f"{few.ratios[n]:.3f}" for n in (1, 4))]
    assert main([*given, "--image_size=96"])[0].cost.tokens[-1] == 1 + 15 + 1


def test_proposals_reach_from_a_few_patches_to_the_budget(capsys):
    rows = main([*TINY, "--image_size=96", "--budget", "0.7"])
    assert len(rows) == 12 and capsys.readouterr().out.count("\n") == 1 + 12 + 2
    assert rows[0].cost.tokens[-1] <= 10  # of 145
    assert [row.ratio for row in rows] == sorted(row.ratio for row in rows) and rows[-1].ratio <= 0.7


@pytest.mark.parametrize(
    "arguments", [[], *([*TINY, each] for each in ("--image_size=60", "--budget=0.01", "--schedule=9:text:0.5"))]
)
def test_what_does_not_fit_is_refused(arguments):
    with pytest.raises(Exception, match="must|either|No schedule"):
        main(arguments)


@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_the_default_budget_fits_four_texts_of_an_image(preset):
    assert main(["--preset", preset, "--texts_per_image", "1", "4"])
