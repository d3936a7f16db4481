"""The functions of patch selection: an example by hand, rounding, ties, gradients and random scores."""

import math

import pytest
import torch
from torch.testing import assert_close

from modeling_trips.patch_selection import (
    choose_tokens,
    keep_topk,
    num_kept_tokens,
    region_targets,
    score_tokens,
    selection_loss,
    shorten_tokens,
    targets_of_candidates,
)


# [CLS] and five candidates of width 2; the keep rate 0.6 keeps ceil(0.6 * 5) = 3.
TOKENS = torch.tensor([[[9.0, 9.0], [1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0], [5.0, 50.0]]])
# The largest three are 0.4 (position 4), 0.25 (position 1) and 0.2 (position 3): kept in order 1, 3, 4.
SCORES = torch.tensor([[0.1, 0.25, 0.05, 0.2, 0.4]])
# 0.1 * (1, 10) + 0.05 * (3, 30)
FUSED = [0.25, 2.5]


def test_example_by_hand():
    kept = choose_tokens(SCORES, keep_rate=0.6)
    assert kept.tolist() == [[1, 3, 4]]
    tokens = shorten_tokens(TOKENS, SCORES, kept)
    expected = torch.tensor([[[9.0, 9.0], [2.0, 20.0], [4.0, 40.0], [5.0, 50.0], FUSED]])
    assert_close(tokens, expected)


def test_score_tokens_by_hand():
    # Two heads of width 1. Scaling 1: logits (ln 1, ln 3) -> (1/4, 3/4), and (ln 1, ln 1) -> (1/2, 1/2).
    query = torch.tensor([[[1.0], [2.0]]])
    key = torch.tensor([[[[0.0], [math.log(3)]], [[0.0], [0.0]]]])
    assert_close(score_tokens(query, key, scaling=1.0), torch.tensor([[0.375, 0.625]]))
    # Scaling 2: head 1 has logits (0, 2 ln 3) -> (1/10, 9/10).
    assert_close(score_tokens(query, key, scaling=2.0), torch.tensor([[0.3, 0.7]]))


def test_number_of_kept_tokens_is_the_exact_ceiling():
    for percent in range(1, 101):
        for num_candidates in range(1, 301):
            exact = -(-percent * num_candidates // 100)
            assert num_kept_tokens(num_candidates, percent / 100) == exact


def test_equal_scores_go_to_the_lower_index():
    assert keep_topk(torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2]]), 2).tolist() == [[0, 1]]
    assert keep_topk(torch.tensor([[0.1, 0.3, 0.2, 0.2, 0.2]]), 3).tolist() == [[1, 2, 3]]
    many = torch.zeros(1, 1000)
    many[0, 500] = 1.0
    assert keep_topk(many, 4).tolist() == [[0, 1, 2, 500]]


def test_scores_get_their_gradient_from_the_fused_token_only():
    tokens = TOKENS.clone().requires_grad_()
    scores = SCORES.clone().requires_grad_()
    kept = choose_tokens(scores, keep_rate=0.6)
    shorten_tokens(tokens, scores, kept).sum().backward()
    # d(sum of the fused token) / d(a_i) = the sum of X_i: 1 + 10 and 3 + 30 for the two that were fused.
    assert_close(scores.grad, torch.tensor([[11.0, 0.0, 33.0, 0.0, 0.0]]))
    # [CLS] and the kept pass on 1; the fused their weight.
    assert_close(tokens.grad[0, :, 0], torch.tensor([1.0, 0.1, 1.0, 0.05, 1.0, 1.0]))


def test_scores_of_half_precision_do_not_overflow_or_tie():
    # Unscaled products of 4 x 64 x 64 * 64 exceed float16's 65504; bfloat16 would round 1.000 and 1.002 together.
    query = torch.full((1, 1, 64), 64.0, dtype=torch.float16)
    key = torch.full((1, 1, 3, 64), 64.0, dtype=torch.float16)
    assert_close(score_tokens(query, key, scaling=0.125), torch.full((1, 3), 1 / 3))
    query = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    key = torch.tensor([[[[1.0, 0.0], [1.0, 2**-9]]]], dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        low, high = score_tokens(query, key, scaling=1.0)[0]
    assert high > low


def test_topk_ranks_nan_last():
    nan = math.nan
    scores = torch.tensor([[nan, 0.1, nan, 0.3], [nan, nan, nan, nan], [0.4, 0.1, 0.2, 0.3]])
    assert keep_topk(scores, 3).tolist() == [[0, 1, 3], [0, 1, 2], [0, 2, 3]]


# Supervision


def test_targets_of_a_region_by_hand():
    regions = torch.tensor(
        [
            [0.5, 0.125, 0.5, 0.25],  # x from 0.25 to 0.75, y from 0 to 0.25
            [0.3, 0.3, 0.0, 0.0],  # no region
            [0.275, 0.25, 0.1, 0.1],  # across two patches: one quarter in the first, three quarters in the second
        ]
    )
    whole, nothing, across = region_targets(regions, (2, 4)).tolist()  # 2 rows, 4 columns
    assert whole == pytest.approx([0, 0.5, 0.5, 0, 0, 0, 0, 0])
    assert nothing == [0] * 8
    assert across == pytest.approx([0.25, 0.75, 0, 0, 0, 0, 0, 0])


def test_a_fused_token_counts_for_what_is_behind_it():
    targets = torch.tensor([[0.5, 0.25, 0.0, 0.25]])
    candidates = torch.tensor([[0, 2, -1]])  # patches 1 and 3 were fused: half of the region
    assert targets_of_candidates(targets, candidates).tolist() == [[0.5, 0.0, 0.5]]
    assert targets_of_candidates(targets * 0, candidates).tolist() == [[0.0, 0.0, 0.0]]


def test_the_selection_loss_by_hand():
    scores = torch.tensor([[0.64, 0.16, 0.2]]).repeat(3, 1)
    candidates = torch.tensor([[0, 2, -1]]).repeat(3, 1)
    # Two patches have equal targets and attention 4 to 1: the target is 2 to 1. The third text has no region.
    targets = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    first = 2 / 3 * math.log(2 / 3 / 0.64) + 1 / 3 * math.log(1 / 3 / 0.16)
    losses = selection_loss(scores, candidates, targets)
    assert losses.tolist() == pytest.approx([first, -math.log(0.16), 0.0], abs=1e-6)


def test_the_target_is_no_way_for_the_gradient():
    """The target is constant, so that the gradient of the logits is the difference."""
    logits = torch.tensor([[0.3, -0.2, 0.9, 0.1]], requires_grad=True)
    targets = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    scores = logits.softmax(dim=-1)
    selection_loss(scores, torch.arange(4)[None], targets).sum().backward()
    scores = scores.detach()
    pulled_to = targets * scores.sqrt()
    pulled_to = pulled_to / pulled_to.sum()
    assert_close(logits.grad, scores - pulled_to)
