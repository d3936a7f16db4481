"""Schedules for a budget, against an exhaustive search."""

from statistics import mean

import pytest

from modeling_trips import UNPRUNED, SelectionSchedule, TripsConfig
from modeling_trips.inspection.cost import forward_cost
from modeling_trips.inspection.plan import MIN_TOKENS, candidate_schedules, plan_schedules, plan_selection


BASE = TripsConfig.from_preset("base", vision_config={"image_size": 384})
NAMED = {"3:image:0.7,6:image:0.7,9:image:0.7,12:text:0.3", "2:text:0.1", "2:text:0.02"}


def test_plan_matches_exhaustive_search():
    num_texts = 3
    budget = 0.9
    config = TripsConfig.from_preset("tiny", vision_config={"num_hidden_layers": 3})
    unpruned = forward_cost(config, 6, UNPRUNED).macs(num_texts)
    found = {}
    for schedule in candidate_schedules(config):
        cost = forward_cost(config, 6, schedule)
        ratio = cost.macs(num_texts) / unpruned
        if cost.tokens[-1] >= MIN_TOKENS and ratio <= budget:
            mean_tokens = mean([*cost.tokens, cost.tokens[-1], cost.tokens[-1]])  # two fusion layers
            found[schedule] = (ratio, mean_tokens)
    assert len(found) > 20

    # Cheapest first, and of equally cheap ones that with most tokens: each of the best keeps more than all before it.
    best = set()
    most_tokens = 0
    for ratio, mean_tokens in sorted(found.values(), key=lambda pair: (pair[0], -pair[1])):
        if mean_tokens > most_tokens:
            best.add((ratio, mean_tokens))
            most_tokens = mean_tokens
    front = plan_selection(config, [num_texts], 6, budget)
    assert {(row.ratio, row.mean_tokens) for row in front} == best
    assert {found[row.schedule] for row in front} == best


def guidances_of(schedule: SelectionSchedule) -> list[str]:
    return [selection.guidance for selection in schedule.selections]


def test_more_texts_per_image_select_later():
    for_one_text = plan_selection(BASE, [1], 40, 0.8)[-1].schedule
    assert guidances_of(for_one_text) == ["text"]
    assert for_one_text.layers[0] <= 5
    for_ten_texts = plan_selection(BASE, [10], 40, 0.8)[-1].schedule
    first, *_, last = guidances_of(for_ten_texts)
    assert first == "image"
    assert last == "text"
    assert for_ten_texts.layers[-1] >= 11
    for_both = plan_selection(BASE, [1, 10], 40, 0.8)[-1]
    assert max(for_both.ratios.values()) <= 0.8


def test_documented_schedules_are_candidates():
    candidates = set(candidate_schedules(BASE))
    assert candidates >= {SelectionSchedule.parse(text) for text in NAMED}
    assert all(schedule.first_text_layer is not None for schedule in candidates)


def test_single_stream_shares_no_layer():
    config = TripsConfig.from_preset("tiny", fusion_type="single_stream")
    for schedule in candidate_schedules(config):
        assert set(guidances_of(schedule)) == {"text"}
    schedules = [SelectionSchedule.parse("2:text:0.5"), SelectionSchedule.parse("2:image:0.5")]
    by_text, by_image = plan_schedules(config, schedules, [1, 10], 6)
    assert by_text.cost == by_image.cost
    assert by_text.cost.per_image == forward_cost(config, 6, UNPRUNED).per_image  # patch embeddings
    assert by_text.mean_tokens == mean([65, 34, 34, 34])


@pytest.mark.parametrize("numbers, text_length, budget", [([1, 0], 6, 0.8), ([1], 65, 0.8), ([1], 6, 1.5)])
def test_bad_numbers_raise(numbers, text_length, budget):
    with pytest.raises(ValueError):
        plan_selection(TripsConfig.from_preset("tiny"), numbers, text_length, budget)
