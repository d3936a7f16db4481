"""Schedules for a budget, against an exhaustive search."""

from statistics import mean

import pytest
from schedules import guidances_in

from modeling_trips import UNPRUNED, SelectionSchedule, TripsConfig
from modeling_trips.inspection.cost import forward_cost
from modeling_trips.inspection.plan import MIN_TOKENS, candidate_schedules, plan_schedules, plan_selection


BASE = TripsConfig.from_preset("base", vision_config={"image_size": 384})
NAMED = {"3:image:0.7,6:image:0.7,9:image:0.7,12:text:0.3", "2:text:0.1", "2:text:0.02"}


def test_plan_matches_exhaustive_search():
    number, budget = 3, 0.9
    config = TripsConfig.from_preset("tiny", vision_config={"num_hidden_layers": 3})
    front = plan_selection(config, [number], 6, budget)
    unpruned, found = forward_cost(config, 6, UNPRUNED).macs(number), {}
    for schedule in candidate_schedules(config):
        cost = forward_cost(config, 6, schedule)
        if cost.tokens[-1] >= MIN_TOKENS and cost.macs(number) / unpruned <= budget:
            mean_tokens = mean([*cost.tokens, cost.tokens[-1], cost.tokens[-1]])  # two fusion layers
            found[schedule] = (cost.macs(number) / unpruned, mean_tokens)
    assert len(found) > 20
    best = {pair for pair in found.values() if not any(r <= pair[0] and t > pair[1] for r, t in found.values())}
    best = {pair for pair in best if not any(r < pair[0] and t == pair[1] for r, t in best)}
    assert {found[row.schedule] for row in front} == best == {(row.ratio, row.mean_tokens) for row in front}


def test_more_texts_per_image_select_later():
    first = [plan_selection(BASE, [number], 40, 0.8)[-1].schedule for number in (1, 10)]
    assert guidances_in(first[0]) == ["text"] and first[0].layers[0] <= 5
    assert guidances_in(first[1])[:: len(first[1].layers) - 1] == ["image", "text"] and first[1].layers[-1] >= 11
    assert max(plan_selection(BASE, [1, 10], 40, 0.8)[-1].ratios.values()) <= 0.8


def test_documented_schedules_are_candidates():
    candidates = set(candidate_schedules(BASE))
    assert candidates >= {SelectionSchedule.parse(text) for text in NAMED}
    assert all(schedule.first_text_layer is not None for schedule in candidates)


def test_single_stream_shares_no_layer():
    config = TripsConfig.from_preset("tiny", fusion_type="single_stream")
    assert {guidance for schedule in candidate_schedules(config) for guidance in guidances_in(schedule)} == {"text"}
    by_text, by_image = plan_schedules(config, map(SelectionSchedule.parse, ("2:text:0.5", "2:image:0.5")), [1, 10], 6)
    assert by_text.cost == by_image.cost
    assert by_text.cost.per_image == forward_cost(config, 6, UNPRUNED).per_image  # patch embeddings
    assert by_text.mean_tokens == mean([65, 34, 34, 34])


@pytest.mark.parametrize("numbers, text_length, budget", [([1, 0], 6, 0.8), ([1], 65, 0.8), ([1], 6, 1.5)])
def test_bad_numbers_raise(numbers, text_length, budget):
    with pytest.raises(ValueError):
        plan_selection(TripsConfig.from_preset("tiny"), numbers, text_length, budget)
