"""Schedules for a budget, against an exhaustive search, and errors."""

import re
from statistics import mean

import pytest
from schedules import guidances_in

from modeling_trips import UNPRUNED, SelectionSchedule, TripsConfig
from modeling_trips.inspection.cost import Cost, forward_cost
from modeling_trips.inspection.plan import (
    PlannedSchedule,
    candidate_schedules,
    cheapest_first,
    plan_schedules,
    plan_selection,
)


BASE = TripsConfig.from_preset("base", vision_config={"image_size": 384})
NUMBERS = (1, 2, 5, 10)
# Schedules of docs/choose.md and the paper.
NAMED = {"5,10", "5:image,10:image", "5:image,10", "3:image:0.7,6:image:0.7,9:image:0.7,12:text:0.3", "2:text:0.1"}


def test_plan_matches_exhaustive_search():
    number, budget, min_kept = 3, 0.9, 0.2
    config = TripsConfig.from_preset("tiny", vision_config={"num_hidden_layers": 3})
    plan = plan_selection(config, number, 6, budget, min_kept)
    unpruned, found = forward_cost(config, 6, UNPRUNED).macs(number), {}
    for schedule in candidate_schedules(config):
        cost = forward_cost(config, 6, schedule)
        if cost.tokens[-1] >= min_kept * 65:
            mean_tokens = mean([*cost.tokens, cost.tokens[-1], cost.tokens[-1]])  # two fusion layers
            found[schedule] = (cost.macs(number) / unpruned, mean_tokens)
    assert len(plan.candidates) == len(found) > 20
    affordable = {schedule: row for schedule, row in found.items() if row[0] <= budget}
    assert 0 < len(affordable) < len(found)
    cheapest, most = plan.cheapest, plan.most_tokens
    assert (cheapest.ratios[number], cheapest.mean_tokens) == found[cheapest.schedule]
    assert cheapest.ratios[number] == min(ratio for ratio, _ in affordable.values())
    assert (most.ratios[number], most.mean_tokens) == affordable[most.schedule]
    assert most.mean_tokens == max(tokens for _, tokens in affordable.values())
    for row in plan.front:
        assert not any(ratio < row.ratios[number] and tokens >= row.mean_tokens for ratio, tokens in found.values())


def test_every_number_of_texts_has_its_budget():
    plan = plan_selection(BASE, [1, 10], 40, [0.4, 0.75])
    for row in (plan.cheapest, plan.most_tokens):
        assert row.ratios[1] <= 0.4 and row.ratios[10] <= 0.75 and row.cost.tokens[-1] >= 0.1 * 577
        assert row.schedule.first_text_layer is not None
    assert plan.most_tokens.mean_tokens > plan.cheapest.mean_tokens
    assert max(plan_selection(BASE, NUMBERS, 40, 0.8).most_tokens.ratios.values()) <= 0.8


def test_more_texts_per_image_select_later():
    first = [plan_selection(BASE, number, 40, 0.8).most_tokens.schedule for number in (1, 10)]
    assert guidances_in(first[0]) == ["text"] and first[0].layers[0] <= 5
    assert guidances_in(first[1])[:: len(first[1].layers) - 1] == ["image", "text"] and first[1].layers[-1] >= 11


def test_documented_schedules_are_candidates():
    candidates = set(candidate_schedules(BASE, guided_by_text=False))
    assert candidates >= {SelectionSchedule.parse(text) for text in NAMED}
    assert all(schedule.first_text_layer is not None for schedule in candidate_schedules(BASE))


def test_single_stream_shares_no_layer():
    config = TripsConfig.from_preset("tiny", fusion_type="single_stream")
    assert {guidance for schedule in candidate_schedules(config) for guidance in guidances_in(schedule)} == {"text"}
    by_text, by_image = plan_schedules(config, map(SelectionSchedule.parse, ("2:text:0.5", "2:image:0.5")), [1, 10], 6)
    assert by_text.cost == by_image.cost
    assert by_text.cost.per_image == forward_cost(config, 6, UNPRUNED).per_image  # patch embeddings
    assert by_text.mean_tokens == mean([65, 34, 34, 34])


@pytest.mark.parametrize(
    ("numbers", "options", "message"),
    [
        ([1, 0], {}, "`texts_per_image`"),
        (1, {"text_length": 65}, "`text_length`"),
        (1, {"budget": 1.5}, "`budget`"),
        ([1, 2], {"budget": [0.5]}, "`budget`"),
        (1, {"min_kept": 1.0}, "`min_kept`"),
    ],
)
def test_bad_options_raise(numbers, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_selection(TripsConfig.from_preset("tiny"), numbers, **{"text_length": 6, "budget": 0.8, **options})


def test_among_equal_costs_more_tokens_come_first():
    def row(cost: float, tokens: float) -> PlannedSchedule:
        return PlannedSchedule(UNPRUNED, Cost(1, 1, (1,)), {1: cost, 4: 0.5 * cost}, tokens)

    rows = [row(0.5, 10.0), row(0.25, 3.0), row(0.5, 20.0), row(0.25, 5.0)]
    assert [each.mean_tokens for each in cheapest_first(rows, {1: 0.5, 4: 0.5})] == [5.0, 3.0, 20.0, 10.0]


def test_no_schedule_fits_a_small_budget():
    plan = plan_selection(TripsConfig.from_preset("tiny"), [1, 10], 6, [0.5, 0.1])
    assert plan.affordable == [] and plan.cheapest is plan.most_tokens is None
    assert str(plan.candidates[0].schedule) == "2:image:0.3,3:image:0.3,4:text:0.7"
    assert plan.front[0] is plan.candidates[0]
