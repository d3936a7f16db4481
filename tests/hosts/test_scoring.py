"""Scorers of visual tokens."""

import pytest
import torch
from tiny_vlms import IMAGE, make_both

from modeling_trips.hosts import prune_inputs
from modeling_trips.hosts.vlm.scoring import (
    SCORERS,
    keep_changes,
    pool,
    select_by_cdpruner,
    select_by_divprune,
    select_by_prompt,
    select_by_visionzip,
    select_by_vispruner,
)


def test_relevance_and_distance_by_hand():
    # Three pairs of equal tokens. The prompt is close to the first pair, less so to the second.
    features = torch.tensor([[[4.0, 0, 0], [4, 0, 0], [0, 3, 0], [0, 3, 0], [0, 0, 2], [0, 0, 2]]])
    prompt = torch.tensor([[[1.0, 0.4, 0], [0, 0, 1]]])
    mask = torch.tensor([[True, False]])
    kept, chosen = select_by_prompt(features, prompt, mask, 2)
    assert kept.tolist() == [[0, 2]]
    assert torch.equal(chosen, features[:, [0, 2]])
    kept, _ = select_by_prompt(features, prompt, mask, 1)
    assert kept.tolist() == [[0]]
    kept, _ = select_by_prompt(features, prompt, torch.ones_like(mask), 2)
    assert kept.tolist() == [[0, 4]]


def random_tokens(seed):
    """Return visual tokens with a part that all share, words and their mask, in float64; the first image has fewer."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 12, 5, generator=generator, dtype=torch.float64)
    features += 2 * torch.randn(2, 1, 5, generator=generator, dtype=torch.float64)
    words = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    return features, words, mask


def cosine_of(first, second):
    return torch.cosine_similarity(first, second, dim=0).item()


@pytest.mark.parametrize("seed", range(5))
def test_divprune_equals_loops(seed):
    features, *_ = random_tokens(seed)
    kept, kept_features = select_by_divprune(features, None, None, 5)
    for tokens, indices, tokens_kept in zip(features, kept.tolist(), kept_features):

        def distance_to_nearest(token, others, tokens=tokens):
            return min(1 - cosine_of(tokens[token], tokens[other]) for other in others if other != token)

        everyone = list(range(12))
        chosen = [max(everyone, key=lambda token: distance_to_nearest(token, everyone))]
        while len(chosen) < 5:
            rest = [token for token in everyone if token not in chosen]
            chosen.append(max(rest, key=lambda token: distance_to_nearest(token, chosen)))
        assert indices == sorted(chosen)
        assert torch.equal(tokens_kept, tokens[indices])


@pytest.mark.parametrize("seed", range(5))
def test_cdpruner_equals_determinants(seed):
    features, words, mask = random_tokens(seed)
    kept, _ = select_by_cdpruner(features, words, mask, 4)
    for tokens, prompt, is_word, indices in zip(features, words, mask, kept.tolist()):
        relevance = []
        for token in tokens:
            cosines = [cosine_of(token, word) for word in prompt[is_word]]
            relevance.append(sum(cosines) / len(cosines))
        low = min(relevance)
        high = max(relevance)
        relevance = [(value - low + 1e-6) / (high - low) for value in relevance]
        kernel = torch.empty(12, 12, dtype=torch.float64)
        for i in range(12):
            for j in range(12):
                kernel[i, j] = relevance[i] * cosine_of(tokens[i], tokens[j]) * relevance[j]

        def determinant(subset, kernel=kernel):
            return kernel[subset][:, subset].det().item()

        chosen: list[int] = []
        while len(chosen) < 4:
            rest = [token for token in range(12) if token not in chosen]
            chosen.append(max(rest, key=lambda token: determinant([*chosen, token])))
        assert indices == sorted(chosen)


def test_cdpruner_without_words_looks_at_diversity_alone():
    features = torch.eye(4)[torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]])]
    prompt = torch.ones(1, 1, 4)
    for is_word in (torch.tensor([[False]]), torch.tensor([[True]])):  # a word as near to all
        kept, _ = select_by_cdpruner(features, prompt, is_word, 4)
        assert kept[0].floor_divide(2).tolist() == [0, 1, 2, 3]


def test_cdpruner_keeps_distinct_tokens_of_few_directions():
    torch.manual_seed(0)
    features = torch.randn(1, 48, 3) @ torch.randn(3, 16)
    kept, _ = select_by_cdpruner(features, torch.randn(1, 2, 16), torch.ones(1, 2, dtype=torch.bool), 24)
    assert len(set(kept[0].tolist())) == 24


@pytest.mark.parametrize("seed", range(5))
def test_rounding_does_not_choose_without_words(seed):
    features, words, mask = random_tokens(seed)
    features = features.float()
    words = words.float()
    noise = 1e-6 * torch.rand_like(features)
    is_word = torch.zeros_like(mask)
    kept, _ = select_by_cdpruner(features, words, is_word, 4)
    kept_with_noise, _ = select_by_cdpruner(features * (1 + noise), words, is_word, 4)
    assert torch.equal(kept, kept_with_noise)
    assert (kept[:, 0] == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_vispruner_equals_loops(seed):
    features, *_ = random_tokens(seed)
    attention = torch.rand(2, 12, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)
    kept, _ = select_by_vispruner(features, None, None, 5, attention=attention)
    for tokens, weights, indices in zip(features, attention, kept.tolist()):

        def likeness(token, others, tokens=tokens):
            return max(cosine_of(tokens[token], tokens[other]) for other in others)

        ranked = weights.argsort(descending=True).tolist()
        chosen = ranked[:2]  # the most attended
        rest = ranked[2:]
        while len(rest) > 3:
            first = rest[::2]
            second = rest[1::2]
            first.sort(key=lambda token: likeness(token, second), reverse=True)
            num_dropped = min(8, len(rest) - 3, len(first))
            rest = first[num_dropped:] + second
        assert indices == sorted(chosen + rest)


@pytest.mark.parametrize("num_kept, num_merged", [(7, 1), (20, 3), (5, 0)])
def test_visionzip_equals_loops(num_kept, num_merged):
    generator = torch.Generator().manual_seed(num_kept)
    tokens = torch.randn(1, 30, 8, generator=generator, dtype=torch.float64)
    attention = torch.rand(1, 30, generator=generator, dtype=torch.float64)
    ranked = attention[0].argsort(descending=True).tolist()
    dominant = ranked[: num_kept - num_merged]
    others = sorted(ranked[num_kept - num_merged :])
    targets = others[:: len(others) // max(1, num_merged)][:num_merged]
    joined = {target: [] for target in targets}
    for token in sorted({*others} - {*targets}):
        if targets:
            joined[max(targets, key=lambda target: cosine_of(tokens[0, token], tokens[0, target]))].append(token)
    expected = {token: tokens[0, token] for token in dominant}
    for target, sources in joined.items():
        mean = tokens[0, sources].mean(dim=0) if sources else 0
        expected[target] = tokens[0, target] + mean
    kept, features = select_by_visionzip(tokens, None, None, num_kept, attention)
    assert sorted(kept[0].tolist()) == sorted(expected)
    for token, feature in zip(kept[0].tolist(), features[0]):
        torch.testing.assert_close(feature, expected[token])


def test_evs_by_hand():
    """The first step stays; at a rate of two thirds, the two tokens that turn most from one step to the next."""
    right, up, left = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    video = torch.tensor([[right, up], [right, left], [left, left]])
    assert keep_changes(video, 2 / 3).int().tolist() == [[1, 1], [0, 1], [1, 0]]
    assert keep_changes(video, 0.01).int().tolist() == [[1, 1], [0, 0], [0, 0]]


def test_pooling_averages_cells():
    features = torch.arange(16.0).reshape(1, 16, 1)
    kept, pooled = pool(features, features, None, 4)
    assert kept.tolist() == [[5, 7, 13, 15]]
    assert pooled[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    with pytest.raises(ValueError):
        pool(features[:, :15], features, None, 4)


@pytest.mark.parametrize("name", SCORERS)
@torch.no_grad()
def test_every_scorer_keeps_the_given_number(name):
    model, inputs = make_both("llava", [1, 1])
    for value in (0.0, torch.nan):
        inputs["pixel_values"][0] = value
        pruned = prune_inputs(model, inputs, visual_tokens=9, scorer=name)
        assert (pruned["input_ids"] == IMAGE).sum(dim=1).tolist() == [9, 9]
        assert model(**pruned).logits[1].isfinite().all()
