"""Evaluation of retrieval: rankings and recalls by hand, and a whole evaluation against a loop over single pairs."""

import weakref

import pytest
import torch
from PIL import Image
from tiny_retrieval import make_config

from modeling_trips import TripsForRetrieval
from trips_examples.data.vocabulary import train_tokenizer
from trips_examples.metrics import retrieval as retrieval_evaluation
from trips_examples.metrics.retrieval import Ranking, RetrievalEvaluator, rank, recalls
from trips_examples.training.models import make_processor


TEXTS = ["a red circle", "red", "a circle", "the blue one", "a blue rectangle and a red one", "blue", "green", "one"]
IMAGE_OF_TEXT = torch.tensor([2, 0, 0, 1, 4, 3, 3, 1])


def make_images():
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (5, 16, 16, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


def make_evaluator(batch_size=3, guidance="text"):
    tokenizer = train_tokenizer(TEXTS)
    config = make_config(schedule=f"2:{guidance}:0.5,3:{guidance}:0.5")
    config.text_config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = TripsForRetrieval(config).eval()
    processor = make_processor(tokenizer, config)
    return RetrievalEvaluator(model, processor, batch_size=batch_size, progress=False)


@torch.no_grad()
def naive_recalls(evaluator, rerank_k):
    """Compute recalls from single pairs, with lists that Python sorts."""
    model = evaluator.model
    similarities = {}
    scores = {}
    for i, image in enumerate(make_images()):
        for t, text in enumerate(TEXTS):
            inputs = evaluator.processor(images=[image], text=[text], return_tensors="pt")
            similarities[t, i] = model(**inputs).logits_per_text.item()
            logits = model.match(**inputs).itm_logits[0]
            scores[t, i] = (logits[1] - logits[0]).item() + similarities[t, i]
    image_queries = [[(t, i) for t in range(8)] for i in range(5)]
    text_queries = [[(t, i) for i in range(5)] for t in range(8)]
    results = {}
    for name, queries in (("i2t", image_queries), ("t2i", text_queries)):
        hits = []
        for pairs in queries:
            pairs.sort(key=similarities.get, reverse=True)
            pairs[:rerank_k] = sorted(pairs[:rerank_k], key=scores.get, reverse=True)
            hits.append([IMAGE_OF_TEXT[t] == i for t, i in pairs])
        for k in (1, 5, 10):
            results[f"{name}_r{k}"] = sum(any(row[:k]) for row in hits) / len(hits)
    results["r_mean"] = sum(results.values()) / 6
    return results


def test_equal_candidates_stand_in_their_order_also_a_few_queries_at_a_time(monkeypatch):
    monkeypatch.setattr(retrieval_evaluation, "SIMILARITIES_PER_STEP", 12)
    query_ids = torch.tensor([0, 1, 2])
    candidate_ids = torch.tensor([2, 2, 1, 0, 1, 0])
    ranking = rank(torch.ones(3, 2), torch.ones(6, 2), query_ids, candidate_ids, k=2)
    assert ranking.candidates.tolist() == [[0, 1]] * 3
    assert ranking.first_right.tolist() == [3, 2, 0]  # a collapsed model is no better than the order of the data


def test_recall_counts_queries_by_the_place_of_their_first_right_candidate():
    candidates = torch.zeros(4, 1, dtype=torch.long)
    scores = torch.zeros(4, 1)
    texts = Ranking(candidates, scores, torch.tensor([0, 4, 5, 30]))
    images = Ranking(candidates, scores, torch.tensor([9, 10, 0, 0]))
    assert recalls({"i2t": texts, "t2i": images}) == {
        "i2t_r1": 1 / 4,
        "i2t_r5": 2 / 4,
        "i2t_r10": 3 / 4,
        "t2i_r1": 2 / 4,
        "t2i_r5": 2 / 4,
        "t2i_r10": 3 / 4,
        "r_mean": pytest.approx(13 / 24),
    }


@pytest.mark.parametrize("guidance, rerank_k, batch_size", [("text", 3, 2), ("image", 3, 3), ("text", 99, 100)])
def test_evaluation_equals_a_loop_over_single_pairs(guidance, rerank_k, batch_size):
    evaluator = make_evaluator(batch_size, guidance)
    results, _ = evaluator.evaluate(make_images(), TEXTS, IMAGE_OF_TEXT, rerank_k)
    expected = naive_recalls(evaluator, rerank_k)
    for name, value in naive_recalls(evaluator, 0).items():
        expected[f"features_{name}"] = value
    assert results.pop("reranked_pairs") <= min(40, (5 + 8) * rerank_k)
    assert results == pytest.approx(expected)


def test_an_image_cache_is_computed_once_per_image_and_gone_before_the_next_ones(monkeypatch):
    evaluator = make_evaluator(batch_size=2)
    encode_images = evaluator.model.model.encode_images
    match = evaluator.model.match
    image_caches = []
    encoded = []
    steps = []

    def counting_encode_images(pixel_values, **options):
        assert all(reference() is None for reference in image_caches)
        image_cache = encode_images(pixel_values, **options)
        image_caches.append(weakref.ref(image_cache.hidden_states))
        encoded.append(len(pixel_values))
        return image_cache

    def counting_match(**inputs):
        steps.append(len(inputs["image_index"]))
        return match(**inputs)

    monkeypatch.setattr(evaluator.model.model, "encode_images", counting_encode_images)
    monkeypatch.setattr(evaluator.model, "match", counting_match)
    evaluator.evaluate(make_images(), TEXTS, IMAGE_OF_TEXT, rerank_k=4)
    assert encoded == [2, 2, 1]  # both directions together, in bounded parts
    assert max(steps) == 2
    assert sum(steps) > 20


def test_what_is_not_finite_is_named():
    evaluator = make_evaluator()
    with torch.no_grad():
        evaluator.model.itm_head.bias[1] = float("nan")
    with pytest.raises(ValueError, match="pair 0"):
        evaluator.evaluate(make_images(), TEXTS, IMAGE_OF_TEXT)
