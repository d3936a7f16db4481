"""Scorers of visual tokens."""

import pytest
import torch
from tiny_vlms import BY_NAME, IMAGE, make_inputs

from modeling_trips.hosts import prune_inputs
from modeling_trips.hosts.vlm.scoring import SCORERS, pool, select_by_prompt, select_diverse


def test_relevance_and_distance_by_hand():
    # Three pairs of equal tokens. The prompt is close to the first pair, less so to the second.
    features = torch.tensor([[[4.0, 0, 0], [4, 0, 0], [0, 3, 0], [0, 3, 0], [0, 0, 2], [0, 0, 2]]])
    prompt, mask = torch.tensor([[[1.0, 0.4, 0], [0, 0, 1]]]), torch.tensor([[True, False]])
    kept, chosen = select_by_prompt(features, prompt, mask, 2)
    assert kept.tolist() == [[0, 2]] and torch.equal(chosen, features[:, [0, 2]])
    kept, _ = select_by_prompt(features, prompt, mask, 1)
    assert kept.tolist() == [[0]]
    assert select_by_prompt(features, prompt, torch.tensor([[True, True]]), 2)[0].tolist() == [[0, 4]]


def test_diversity_keeps_one_token_of_each_kind():
    features = torch.eye(4)[torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]])] * torch.tensor([5.0, 4, 3, 2])
    kept, _ = select_diverse(features, features, torch.ones(1, 8, dtype=torch.bool), 4)
    assert sorted(kept[0].floor_divide(2).tolist()) == [0, 1, 2, 3]


def test_pooling_averages_cells():
    features = torch.arange(16.0).reshape(1, 16, 1)
    kept, pooled = pool(features, features, None, 4)
    assert kept.tolist() == [[5, 7, 13, 15]] and pooled[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    with pytest.raises(ValueError):
        pool(features[:, :15], features, None, 4)


@pytest.mark.parametrize("name", SCORERS)
@torch.no_grad()
def test_every_scorer_keeps_the_given_number(name):
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm, [1, 1])
    for value in (0.0, torch.nan):
        inputs["pixel_values"][0] = value
        pruned = prune_inputs(model, inputs, visual_tokens=9, scorer=name)
        assert (pruned["input_ids"] == IMAGE).sum(dim=1).tolist() == [9, 9]
        assert model(**pruned).logits[1].isfinite().all()
