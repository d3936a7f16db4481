"""What holds in a step of a training."""

import pytest
from toy_tasks import OPTIONS, write_task

from modeling_trips import UNPRUNED, SelectionSchedule
from trips_examples import run_vqa
from trips_examples.training.phases import Phases


SCHEDULE = SelectionSchedule.parse("6:text:0.25")
SHARES = {"unpruned_share": 0.5, "relevance_share": 0.4}


def test_unpruned_then_scoring_then_pruned():
    """By hand: of 20 steps, 10 are unpruned, of which the last 4 score."""
    phases = Phases(SCHEDULE, max_steps=20, **SHARES)
    names = {UNPRUNED: "u", SCHEDULE: "p", SelectionSchedule.parse("6:text:score"): "s"}
    assert "".join(names[phases.schedule_of(step)] for step in range(1, 21)) == "uuuuuusssspppppppppp"
    assert (phases.unpruned_steps, phases.first_relevance_step) == (10, 7)
    assert [phases.evaluated_after(step) for step in (0, 1, 10, 11)] == [SCHEDULE, UNPRUNED, UNPRUNED, SCHEDULE]
    assert phases.trained_keep_rates == [0.25, 1.0]


def test_a_schedule_that_nothing_scores_or_that_drops_nothing_has_no_relevance():
    unpruned = Phases(UNPRUNED, max_steps=20, **SHARES, learns_relevance=True)
    assert all(unpruned.schedule_of(step) == UNPRUNED for step in range(1, 21))
    assert (unpruned.unpruned_steps, unpruned.first_relevance_step, str(unpruned)) == (0, None, "unpruned")
    by_chance = SelectionSchedule.parse("6:random:0.5")
    phases = Phases(by_chance, max_steps=20, **SHARES, learns_relevance=True)
    assert [phases.schedule_of(step) for step in (10, 11)] == [UNPRUNED, by_chance]


def test_relevance_may_begin_where_pruning_begins():
    phases = Phases(SCHEDULE, max_steps=20, unpruned_share=0.5, learns_relevance=True)
    assert (phases.schedule_of(10), phases.first_relevance_step) == (UNPRUNED, 11)
    assert Phases(SCHEDULE, max_steps=20, unpruned_share=0.5).first_relevance_step is None


def test_the_last_step_is_pruned():
    phases = Phases(SCHEDULE, max_steps=3, unpruned_share=0.99)
    assert [phases.schedule_of(step) for step in (1, 2, 3)] == [UNPRUNED, UNPRUNED, SCHEDULE]


def test_each_pruned_step_draws_its_rate_by_seed_and_step():
    phases = Phases(SCHEDULE, max_steps=300, keep_rates=[0.125, 0.5, 1.0], seed=1)
    schedules = [phases.schedule_of(step) for step in range(1, 301)]
    assert schedules == [phases.schedule_of(step) for step in range(1, 301)]
    for keep_rate in (0.125, 0.5, 1.0):
        assert 70 < schedules.count(SCHEDULE.with_keep_rate(keep_rate)) < 130
    other = Phases(SCHEDULE, max_steps=300, keep_rates=[0.125, 0.5, 1.0], seed=2)
    assert schedules != [other.schedule_of(step) for step in range(1, 301)]
    assert phases.trained_keep_rates == [0.125, 0.5, 1.0]


WRONG = [
    ("keep_rates", ["--keep_rates", "0.1", "0.5", "--schedule=1:image:0.5,2:text:0.5"]),
    ("keep_rates", ["--keep_rates", "0.5", "--schedule=unpruned"]),
    ("learns_relevance", ["--learns_relevance=True", "--fusion_type=single_stream"]),
    ("relevance_share", ["--relevance_share=0.5", "--fusion_type=single_stream"]),
    ("learns_relevance", ["--learns_relevance=True", "--schedule=2:random:0.5"]),
]


@pytest.mark.parametrize("name, words", WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_does_not_fit_the_model_is_refused_before_data_are_read(name, words, tmp_path):
    files = write_task("vqa", tmp_path)
    for path in tmp_path.glob("*.jsonl"):
        path.write_text("no JSON")
    with pytest.raises(ValueError, match=f"--{name}"):
        run_vqa.main([*files, *OPTIONS, *words, f"--output_dir={tmp_path / 'run'}"])
