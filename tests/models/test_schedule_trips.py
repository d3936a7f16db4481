"""Schedules: text form, settings out of range, layers that only score, and the part that texts share."""

import pickle
import subprocess
import sys

import pytest

from modeling_trips import UNPRUNED, LayerSelection, SelectionSchedule, schedule_trips


@pytest.mark.parametrize(
    "text, layers, selections",
    [
        ("unpruned", (), ()),
        ("2:text:0.3", (2,), (LayerSelection("text", 0.3),)),
        ("6:image:0.5, 9:text:0.25", (6, 9), (LayerSelection("image", 0.5), LayerSelection("text", 0.25))),
        ("5,10", (5, 10), (LayerSelection("text", 0.7),) * 2),
        ("3:image", (3,), (LayerSelection("image", 0.7),)),
        ("3::0.5", (3,), (LayerSelection("text", 0.5),)),
        ("12:random:1e-2", (12,), (LayerSelection("random", 0.01),)),
        ("2:image:1.0,3:text:0.5", (3,), (LayerSelection("text", 0.5),)),  # a layer that keeps all is none
        ("6:text:score", (6,), (LayerSelection("text", 1.0, only_scores=True),)),
    ],
)
def test_text_form(text, layers, selections):
    schedule = SelectionSchedule.parse(text)
    assert (schedule.layers, schedule.selections) == (layers, selections)
    assert schedule.by_layer == dict(zip(layers, selections))
    assert SelectionSchedule.parse(str(schedule)) == schedule
    assert pickle.loads(pickle.dumps(schedule)).by_layer == schedule.by_layer


WRONG_TEXTS = ["", "a", "2:text:0.5:1", "2:text:1.2.3", "2:text:2", "2:text:0", "2:text:nan", "2:txet:0.5"]
WRONG_TEXTS += [
    "0:text:0.5",
    "9:text:0.5,6:image:0.5",
    "6:text,6:image",
    "6:random:score",
    "6:score",
    "2:image:score,6:text:0.1",
]


@pytest.mark.parametrize("text", WRONG_TEXTS)
def test_wrong_text_form_is_refused(text):
    with pytest.raises(ValueError, match="schedule|scores|guidance|keep_rate"):
        SelectionSchedule.parse(text)


@pytest.mark.parametrize("selection", [LayerSelection("text", 0.5, True), LayerSelection("image", -1.0)])
def test_wrong_settings_are_refused(selection):
    with pytest.raises(ValueError):
        SelectionSchedule((2,), (selection,))


def test_a_layer_behind_the_tower_is_refused():
    SelectionSchedule.parse("4:text:score").check_fits(4)
    with pytest.raises(ValueError, match="5:text:score"):
        SelectionSchedule.parse("5:text:score").check_fits(4)


def test_scoring_schedule_scores_by_the_same_and_keeps_all():
    schedule = SelectionSchedule.parse("2:image:0.5,4:random:0.5,6:text:0.1")
    scoring = schedule.scoring()
    assert str(scoring) == "2:image:score,6:text:score"
    assert scoring.scores_only
    assert scoring.scoring() == scoring
    assert not schedule.scores_only
    assert not SelectionSchedule.parse("6:text:0.1").scores_only
    assert not UNPRUNED.scores_only
    assert UNPRUNED.scoring() == UNPRUNED


@pytest.mark.parametrize("settings", ["0.5", "score"])
def test_texts_share_what_is_before_the_first_layer_that_they_score(settings):
    schedule = SelectionSchedule.parse(f"2:image:{settings},6:text:{settings},9:text:{settings}")
    assert schedule.text_layers == (6, 9)
    assert schedule.first_text_layer == 6
    assert str(schedule.before(6)) == f"2:image:{settings}"
    assert schedule.before(None) == schedule
    assert SelectionSchedule.parse("2:image:0.5").first_text_layer is None


def test_the_module_needs_the_standard_library_alone():
    command = [sys.executable, "-I", "-S", schedule_trips.__file__]  # without installed packages
    subprocess.run(command, check=True, timeout=60)
