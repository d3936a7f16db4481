"""Schedules for a budget, against a search with PyTorch's counter, and errors."""

import re
from statistics import mean

import pytest
import torch
from schedules import guidances_in
from torch.utils.flop_counter import FlopCounterMode

from modeling_trips import UNPRUNED, SelectionSchedule, TripsConfig, TripsModel, use_schedule
from modeling_trips.inspection.cost import forward_cost
from modeling_trips.inspection.plan import candidate_schedules, plan_schedules, plan_selection


BASE = TripsConfig.from_preset("base", vision_config={"image_size": 384})
NUMBERS = (1, 2, 5, 10)
# Schedules of docs/speed.md and the paper.
NAMED = {
    "5,10",
    "5:image,10:image",
    "5:image,10",
    "5:image,12",
    "5:image:0.7,10:image:0.7,12:text:0.3",
    "3:image:0.7,6:image:0.7,9:image:0.7,12:text:0.3",
    "2:text:0.25",
    "2:text:0.1",
    "5:text:0.1",
    "2:image:0.5,5:text:0.2",
}


class Counter:
    """Counter of MACs and tokens of a tiny model on the meta device."""

    def __init__(self, config: TripsConfig, text_length: int):
        with torch.device("meta"):
            self.model = TripsModel._from_config(config, attn_implementation="eager").eval()
        self.text_length = text_length

    def run(self, schedule: SelectionSchedule, texts_per_image: int) -> tuple[int, list[int]]:
        inputs = {
            "input_ids": torch.zeros(texts_per_image, self.text_length, dtype=torch.long, device="meta"),
            "pixel_values": torch.zeros(1, 3, 64, 64, device="meta"),
            "image_index": torch.zeros(texts_per_image, dtype=torch.long, device="meta"),
        }
        with FlopCounterMode(display=False) as counter, torch.no_grad(), use_schedule(self.model, schedule):
            outputs = self.model(**inputs, output_hidden_states=True)
        states = outputs.vision_model_output.hidden_states[1:]
        return counter.get_total_flops() // 2, [state.shape[1] for state in states]


@pytest.mark.slow
def test_plan_matches_exhaustive_search():
    number, budget, min_kept = 3, 0.9, 0.2
    config = TripsConfig.from_preset("tiny", vision_config={"num_hidden_layers": 3})
    plan = plan_selection(config, number, 6, budget, min_kept)
    counter, found = Counter(config, text_length=6), {}
    unpruned, _ = counter.run(UNPRUNED, number)
    for schedule in candidate_schedules(config):
        macs, tokens = counter.run(schedule, number)
        if tokens[-1] >= min_kept * 65:
            found[schedule] = (macs / unpruned, mean([*tokens, tokens[-1], tokens[-1]]))  # two fusion layers
    assert plan.num_candidates == len(found) > 20
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
        assert row.ratios[1] <= 0.4 and row.ratios[10] <= 0.75 and row.fused_tokens >= 0.1 * 577
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
        ([], {}, "`texts_per_image`"),
        ([1, 0], {}, "`texts_per_image`"),
        (1, {"text_length": 65}, "`text_length`"),
        (1, {"budget": 1.5}, "`budget`"),
        ([1, 2], {"budget": [0.5]}, "`budget`"),
        (1, {"min_kept": 1.0}, "`min_kept`"),
        (1, {"min_kept": 0.99}, "`min_kept`"),
        ([1, 10], {"budget": [0.5, 0.1]}, "3:image:0.3,4:text:0.7"),
    ],
)
def test_bad_options_raise(numbers, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_selection(TripsConfig.from_preset("tiny"), numbers, **{"text_length": 6, "budget": 0.8, **options})
