"""Scorers of visual tokens."""

import pytest
import torch
from tiny_vlms import BY_NAME, IMAGE, make_inputs

from modeling_trips.hosts import prune_inputs
from modeling_trips.hosts.vlm.scoring import (
    SCORERS,
    pool,
    select_by_cdpruner,
    select_by_divprune,
    select_by_prompt,
    select_by_vispruner,
)


def test_relevance_and_distance_by_hand():
    # Three pairs of equal tokens. The prompt is close to the first pair, less so to the second.
    features = torch.tensor([[[4.0, 0, 0], [4, 0, 0], [0, 3, 0], [0, 3, 0], [0, 0, 2], [0, 0, 2]]])
    prompt, mask = torch.tensor([[[1.0, 0.4, 0], [0, 0, 1]]]), torch.tensor([[True, False]])
    kept, chosen = select_by_prompt(features, prompt, mask, 2)
    assert kept.tolist() == [[0, 2]] and torch.equal(chosen, features[:, [0, 2]])
    kept, _ = select_by_prompt(features, prompt, mask, 1)
    assert kept.tolist() == [[0]]
    assert select_by_prompt(features, prompt, torch.tensor([[True, True]]), 2)[0].tolist() == [[0, 4]]


def random_tokens(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return visual tokens with a part that all share, words and their mask, in float64; the first image has fewer."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 12, 5, generator=generator, dtype=torch.float64)
    features += 2 * torch.randn(2, 1, 5, generator=generator, dtype=torch.float64)
    words = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    return features, words, mask


def test_divprune_by_hand():
    angles = torch.tensor([0.0, 10.0, 80.0, 200.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=-1)[None] * torch.tensor([5.0, 1.0, 2.0, 3.0])[:, None]
    # The nearest other token of 200 is at 120 degrees. 10 is the farthest from it; 80 is 70 from 10, and 0 only 10.
    for num_kept, expected in ((1, [3]), (2, [1, 3]), (3, [1, 2, 3])):
        kept, chosen = select_by_divprune(features, None, None, num_kept)
        assert kept.tolist() == [expected] and torch.equal(chosen, features[:, expected])


@pytest.mark.parametrize("seed", range(5))
def test_divprune_equals_loops(seed):
    features, *_ = random_tokens(seed)
    kept, _ = select_by_divprune(features, None, None, 5)
    for tokens, own in zip(features, kept.tolist()):

        def distance(first: int, second: int, tokens=tokens) -> float:
            return 1 - float(torch.cosine_similarity(tokens[first], tokens[second], dim=0))

        everyone = range(len(tokens))
        chosen = [max(everyone, key=lambda token: min(distance(token, other) for other in everyone if other != token))]
        while len(chosen) < 5:
            rest = [token for token in everyone if token not in chosen]
            chosen.append(max(rest, key=lambda token: min(distance(token, other) for other in chosen)))
        assert own == sorted(chosen)


def test_cdpruner_by_hand():
    # Cosines with the prompt: 0.894, 0.984, 0.447, 0. The second token is the most relevant. The determinant with it
    # is 0.297 for the first token, which is relevant but near to it, and 0.132 for the third.
    features = torch.tensor([[[1.0, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 0, 1]]])
    prompt, mask = torch.tensor([[[1.0, 0.5, 0], [0, 0, 9]]]), torch.tensor([[True, False]])
    assert select_by_cdpruner(features, prompt, mask, 1)[0].tolist() == [[1]]
    assert select_by_cdpruner(features, prompt, mask, 2)[0].tolist() == [[0, 1]]
    # With the other word alone, the last token, and then the others by diversity.
    assert select_by_cdpruner(features, prompt, ~mask, 1)[0].tolist() == [[3]]


@pytest.mark.parametrize("seed", range(5))
def test_cdpruner_equals_determinants(seed):
    features, words, mask = random_tokens(seed)
    kept, _ = select_by_cdpruner(features, words, mask, 4)
    for tokens, own_words, is_word, own in zip(features, words, mask, kept.tolist()):
        kernel = torch.empty(12, 12, dtype=torch.float64)
        cosines = [[torch.cosine_similarity(token, word, dim=0) for word in own_words[is_word]] for token in tokens]
        relevance = [float(sum(row)) / len(row) for row in cosines]
        low, high = min(relevance), max(relevance)
        relevance = [(value - low + 1e-6) / (high - low) for value in relevance]
        for i in range(12):
            for j in range(12):
                kernel[i, j] = relevance[i] * torch.cosine_similarity(tokens[i], tokens[j], dim=0) * relevance[j]
        chosen: list[int] = []
        while len(chosen) < 4:
            rest = [token for token in range(12) if token not in chosen]
            chosen.append(max(rest, key=lambda token: float(kernel[[*chosen, token]][:, [*chosen, token]].det())))
        assert own == sorted(chosen)


def test_cdpruner_without_words_looks_at_diversity_alone():
    features = torch.eye(4)[torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]])]
    prompt = torch.ones(1, 1, 4)
    for is_word in (torch.tensor([[False]]), torch.tensor([[True]])):  # a word as near to all
        kept, _ = select_by_cdpruner(features, prompt, is_word, 4)
        assert kept[0].floor_divide(2).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_rounding_does_not_choose_without_words(seed):
    features, words, mask = (
        tensor.float() if tensor.is_floating_point() else tensor for tensor in random_tokens(seed)
    )
    none = torch.zeros_like(mask)
    kept, _ = select_by_cdpruner(features, words, none, 4)
    rounded, _ = select_by_cdpruner(features * (1 + 1e-6 * torch.rand_like(features)), words, none, 4)
    assert torch.equal(kept, rounded) and (kept[:, 0] == 0).all()


def test_vispruner_by_hand():
    # The first two are the most attended. Of the others, dealt into (2, 4) and (3), token 4 has the direction of 3.
    features = torch.tensor([[[1.0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 2], [0, 0, 1]]])
    attention = torch.tensor([[0.6, 0.2, 0.1, 0.06, 0.04]])
    kept, _ = select_by_vispruner(features, None, None, 4, attention=attention)
    assert kept.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("seed", range(5))
def test_vispruner_equals_loops(seed):
    features, *_ = random_tokens(seed)
    attention = torch.rand(2, 12, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)
    kept, _ = select_by_vispruner(features, None, None, 5, attention=attention)
    for tokens, weights, own in zip(features, attention, kept.tolist()):
        ranked = sorted(range(12), key=lambda token: -weights[token])
        chosen, rest = ranked[:2], ranked[2:]
        while len(rest) > 3:
            first, second = rest[::2], rest[1::2]
            likeness = {
                token: max(float(torch.cosine_similarity(tokens[token], tokens[other], dim=0)) for other in second)
                for token in first
            }
            first.sort(key=lambda token: -likeness[token])
            rest = first[min(8, len(rest) - 3, len(first)) :] + second
        assert own == sorted(chosen + rest)


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
