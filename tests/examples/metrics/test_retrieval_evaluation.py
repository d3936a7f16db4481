"""Evaluation of retrieval: rankings and recalls by hand, and a whole evaluation against a loop over single pairs."""

import weakref

import PIL.Image
import pytest
import torch
from tiny_retrieval import make_config

from modeling_trips import TripsForRetrieval
from trips_examples.data.vocabulary import train_wordpiece_tokenizer
from trips_examples.metrics import retrieval as retrieval_evaluation
from trips_examples.metrics.retrieval import (
    Ranking,
    RetrievalEvaluator,
    rank,
    recalls,
    rerank,
)
from trips_examples.training.models import make_processor


TEXTS = ["a red circle", "red", "a circle", "the blue one", "a blue rectangle and a red one", "blue", "green", "one"]
IMAGE_OF_TEXT = torch.tensor([2, 0, 0, 1, 4, 3, 3, 1])


def make_images() -> list[PIL.Image.Image]:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (5, 16, 16, 3), generator=generator, dtype=torch.uint8)
    return [PIL.Image.fromarray(image.numpy()) for image in pixels]


def make_evaluator(batch_size: int = 3, selection_guidance: str = "text", keep_rate: float = 0.5, **options):
    tokenizer = train_wordpiece_tokenizer(TEXTS)
    config = make_config(selection_guidance=selection_guidance, keep_rate=keep_rate)
    config.text_config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = TripsForRetrieval(config).eval()
    processor = make_processor(tokenizer, config)
    return RetrievalEvaluator(model, processor, batch_size=batch_size, progress=False, **options)


@torch.no_grad()
def naive_recalls(evaluator: RetrievalEvaluator, rerank_k: int, rerank_by: str = "both") -> dict[str, float]:
    """Compute recalls from single pairs, with lists that Python sorts."""
    model, processor, images = evaluator.model, evaluator.processor, make_images()

    def inputs(text: int, image: int):
        return processor(images=[images[image]], text=[TEXTS[text]], return_tensors="pt")

    def score(text: int, image: int) -> float:
        probability = model.match(**inputs(text, image)).itm_logits[0].softmax(0)[1]
        return probability.logit().item() + (similarity[text, image].item() if rerank_by == "both" else 0)

    similarity = torch.tensor(
        [[model(**inputs(text, image)).logits_per_text.item() for image in range(5)] for text in range(8)]
    )
    right = [[int(IMAGE_OF_TEXT[text]) == image for image in range(5)] for text in range(8)]
    hits = {"i2t": [], "t2i": []}
    for text in range(8):
        found = sorted(range(5), key=lambda image: -similarity[text, image])
        best = sorted(found[:rerank_k], key=lambda image: -score(text, image))
        hits["t2i"].append([right[text][image] for image in best + found[rerank_k:]])
    for image in range(5):
        found = sorted(range(8), key=lambda text: -similarity[text, image])
        best = sorted(found[:rerank_k], key=lambda text: -score(text, image))
        hits["i2t"].append([right[text][image] for text in best + found[rerank_k:]])
    results = {
        f"{name}_r{k}": sum(any(row[:k]) for row in rows) / len(rows)
        for name, rows in hits.items()
        for k in (1, 5, 10)
    }
    return {**results, "r_mean": sum(results.values()) / 6}


# ---------------------------------------------------------------------------------------------------------------------
# Rankings


def test_candidates_stand_by_similarity_and_the_first_right_one_counts():
    # Similarities to the texts 0 to 3: .1 .9 .5 .7 of image 0, .6 .2 .4 .3 of image 1.
    similarities = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.6, 0.2, 0.4, 0.3]])
    image_of_text = torch.tensor([0, 1, 0, 1])
    ranking = rank(similarities, torch.arange(2), torch.eye(4), image_of_text, k=3)
    assert ranking.candidates.tolist() == [[1, 3, 2], [0, 2, 3]]
    torch.testing.assert_close(ranking.similarities, torch.tensor([[0.9, 0.7, 0.5], [0.6, 0.4, 0.3]]))
    assert ranking.first_right.tolist() == [2, 2]  # image 0: text 2 at rank 2, before text 0; image 1: text 3
    back = rank(torch.eye(4), image_of_text, similarities, torch.arange(2), k=9)
    assert back.candidates.tolist() == [[1, 0], [0, 1], [0, 1], [0, 1]]
    assert back.first_right.tolist() == [1, 1, 0, 1]


def test_equal_candidates_stand_in_their_order():
    ranking = rank(torch.ones(3, 2), torch.tensor([0, 1, 2]), torch.ones(6, 2), torch.tensor([2, 2, 1, 0, 1, 0]), k=2)
    assert ranking.candidates.tolist() == [[0, 1]] * 3
    assert ranking.first_right.tolist() == [3, 2, 0]  # a collapsed model is no better than the order of the data


def test_queries_are_ranked_a_few_at_a_time(monkeypatch):
    queries, candidates = torch.randn(23, 4), torch.randn(17, 4)
    arguments = queries, torch.arange(23) % 17, candidates, torch.arange(17), 5
    expected = rank(*arguments)
    monkeypatch.setattr(retrieval_evaluation, "SIMILARITIES_PER_STEP", 40)
    ranking = rank(*arguments)
    assert torch.equal(ranking.candidates, expected.candidates)
    assert torch.equal(ranking.first_right, expected.first_right)


def test_reranking_orders_the_best_anew_and_leaves_the_others():
    candidate_ids = torch.tensor([0, 1, 2, 3])
    similarities = torch.tensor([[9.0, 8.0, 7.0], [6.0, 5.0, 4.0], [3.0, 2.0, 1.0]])
    ranking = Ranking(torch.tensor([[3, 0, 1], [0, 3, 2], [2, 1, 0]]), similarities, torch.tensor([1, 3, 0]))
    scores = torch.tensor([[0.0, 2.0, 1.0], [0.0, 5.0, 0.0], [1.0, 1.0, 3.0]])
    again = rerank(ranking, scores, torch.tensor([0, 1, 2]), candidate_ids)
    assert again.candidates.tolist() == [[0, 1, 3], [3, 0, 2], [0, 2, 1]]
    assert again.similarities.tolist() == [[8.0, 7.0, 9.0], [5.0, 6.0, 4.0], [1.0, 3.0, 2.0]]
    assert again.first_right.tolist() == [0, 3, 1]  # the true candidate of query 1 is not among its best


def test_recall_counts_queries_by_the_place_of_their_first_right_candidate():
    unused = torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, 1)
    texts, images = Ranking(*unused, torch.tensor([0, 4, 5, 30])), Ranking(*unused, torch.tensor([9, 10, 0, 0]))
    results = recalls(texts, images)
    expected = {"i2t_r1": 1 / 4, "i2t_r5": 2 / 4, "i2t_r10": 3 / 4, "t2i_r1": 2 / 4, "t2i_r5": 2 / 4, "t2i_r10": 3 / 4}
    assert results == {**expected, "r_mean": pytest.approx(13 / 24)}


# ---------------------------------------------------------------------------------------------------------------------
# With a model


@pytest.mark.parametrize(
    "options", [{}, {"selection_guidance": "image"}, {"keep_rate": 1.0}], ids=["text", "image", "unpruned"]
)
@pytest.mark.parametrize("rerank_k, rerank_by", [(1, "both"), (3, "both"), (3, "matching"), (99, "both")])
def test_evaluation_equals_a_loop_over_single_pairs(options, rerank_k, rerank_by):
    evaluator = make_evaluator(**options)
    results = evaluator.evaluate(make_images(), TEXTS, IMAGE_OF_TEXT, rerank_k, rerank_by).metrics
    expected = {f"features_{name}": value for name, value in naive_recalls(evaluator, 0).items()}
    expected |= naive_recalls(evaluator, rerank_k, rerank_by)
    assert results.pop("reranked_pairs") <= min(40, (5 + 8) * rerank_k)
    assert results.pop("reranked_pairs_per_second") > 0
    assert results == pytest.approx(expected)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_matching_scores_are_those_of_each_pair_alone(batch_size):
    evaluator = make_evaluator(batch_size)
    model, processor, images = evaluator.model, evaluator.processor, make_images()
    pairs = torch.tensor([[1, 0], [1, 5], [1, 7], [2, 0], [4, 1], [4, 2], [4, 4], [4, 5], [4, 7]])
    scores = evaluator.match(images, evaluator.index_texts(TEXTS), pairs)
    for (image, text), score in zip(pairs.tolist(), scores):
        inputs = processor(images=[images[image]], text=[TEXTS[text]], return_tensors="pt")
        probability = model.match(**inputs).itm_logits[0].softmax(0)[1]
        torch.testing.assert_close(score.sigmoid(), probability)


def test_half_precision_is_kept_where_it_is_asked_for():
    evaluator, expected = make_evaluator(dtype=torch.float16), make_evaluator()
    texts = evaluator.index_texts(TEXTS)
    assert {evaluator.index_images(make_images()).dtype, texts.embeds.dtype, texts.states[0].dtype} == {torch.float16}
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(8))
    scores = evaluator.match(make_images(), texts, pairs)
    exact = expected.match(make_images(), expected.index_texts(TEXTS), pairs)
    torch.testing.assert_close(scores, exact, rtol=0.02, atol=0.02)


def test_an_image_cache_is_computed_once_per_image_and_gone_before_the_next_ones(monkeypatch):
    evaluator, image_caches, encoded, steps = make_evaluator(batch_size=2), [], [], []
    encode_images, match = evaluator.model.model.encode_images, evaluator.model.match

    def counting_encode_images(pixel_values):
        assert all(reference() is None for reference in image_caches)
        image_cache = encode_images(pixel_values)
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
    assert max(steps) == 2 and sum(steps) > 20


def test_images_are_read_when_they_are_needed():
    class Images(torch.utils.data.Dataset):
        reads = []

        def __len__(self):
            return 5

        def __getitem__(self, number):
            self.reads.append(number)
            return make_images()[number]

    evaluator = make_evaluator()
    scores = evaluator.match(Images(), evaluator.index_texts(TEXTS), torch.tensor([[1, 0], [1, 1], [3, 2]]))
    assert Images.reads == [1, 3] and scores.shape == (3,)


def test_bad_input_is_named():
    evaluator = make_evaluator()
    with pytest.raises(ValueError, match="`rerank_by` must be"):
        evaluator.evaluate(make_images(), TEXTS, IMAGE_OF_TEXT, rerank_by="itm")
    with pytest.raises(ValueError, match="5 images"):
        evaluator.evaluate(make_images(), TEXTS[:2], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="4 images"):
        evaluator.evaluate(make_images()[:4], TEXTS, IMAGE_OF_TEXT)
    with torch.no_grad():
        evaluator.model.itm_head.bias[1] = float("nan")
    with pytest.raises(ValueError, match="pair 0"):
        evaluator.evaluate(make_images(), TEXTS, IMAGE_OF_TEXT)
    with torch.no_grad():
        evaluator.model.text_proj.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="text 0"):
        evaluator.evaluate(make_images(), TEXTS, IMAGE_OF_TEXT)
