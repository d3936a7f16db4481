"""Caption metrics: values by hand, against pycocoevalcap, and without Java."""

import math

import evaluate
import pytest
from places import EXAMPLES


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(EXAMPLES / "metrics/caption_metrics.py"))


@pytest.fixture(scope="module")
def module(metric):
    from trips_examples.metrics import caption_metrics

    return caption_metrics


@pytest.mark.parametrize(
    "caption, words",
    [
        ("A Dog runs, fast.", "a dog runs fast"),
        ("it isn't the dog's ball", "it is n't the dog 's ball"),
        ("two t-shirts at 10:30 for 2.50", "two t-shirts at 10:30 for 2.50"),
        ('"quoted" (words)!', "quoted words"),
        ("Fünf grüne Äpfel.", "fünf grüne äpfel"),
        ("cafe\u0301 über", "café über"),
        ("सेब लाल है।", "सेब लाल है"),
        ("一只红色的猫，2只狗", "一 只 红 色 的 猫 2 只 狗"),
        ("赤いネコ", "赤 い ネ コ"),
        ("น้ำ สวัสดี", "น้ ำ ส วั ส ดี"),
        ("", ""),
    ],
)
def test_words_without_java(caption, words, module):
    assert module.split_words(caption) == words


def test_hand_worked_scores(metric):
    """Without Java, 4 of 4 words, 2 of 3 pairs and 1 of 2 triples are in the reference."""
    scores = metric.compute(predictions=["a cat sat down"], references=[["a cat sat up down there"]], use_java=False)
    brevity = math.exp(1 - 6 / 4)
    assert scores["bleu_1"] == pytest.approx(brevity, rel=1e-6)
    assert scores["bleu_2"] == pytest.approx(brevity * math.sqrt(2 / 3), rel=1e-6)
    assert scores["bleu_3"] == pytest.approx(brevity * (2 / 3 * 1 / 2) ** (1 / 3), rel=1e-6)
    precision = 4 / 4
    recall = 4 / 6  # the longest common subsequence is all four words
    assert scores["rouge_l"] == pytest.approx((1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision))
    assert "meteor" not in scores


LANGUAGES = {
    "English": ["a red cat on the table", "two dogs run on the beach"],
    "German": ["fünf grüne Äpfel auf dem Tisch", "zwei Hunde laufen am Strand"],
    "Spanish": ["un niño jugando al fútbol", "dos perros corren en la playa"],
    "Hindi": ["सेब लाल है और बड़ा है", "दो कुत्ते समुद्र तट पर दौड़ते हैं"],
    "Chinese": ["一只红色的猫在桌子上", "两只狗在海滩上奔跑"],
    "Thai": ["แมวสีแดงบนโต๊ะ", "สุนัขสองตัววิ่งบนชายหาด"],
}


@pytest.mark.parametrize(
    "language, use_java",
    [*((name, False) for name in LANGUAGES), pytest.param("Chinese", True, marks=pytest.mark.slow)],
)
def test_right_captions_score_alike_in_every_language(language, use_java, metric, module):
    if use_java and not module.java_runs():
        pytest.skip("Java does not run here")
    captions = LANGUAGES[language]
    references = [[caption] for caption in captions]
    scores = metric.compute(predictions=captions, references=references, use_java=use_java)
    assert scores["cider"] == pytest.approx(10)
    assert scores["bleu_4"] == pytest.approx(1)
    half = metric.compute(predictions=[captions[0]] * 2, references=references, use_java=False)
    assert 4 < half["cider"] < 6
    assert half["rouge_l"] < 1


def test_without_java_it_says_what_is_left_out_and_how_to_get_it(metric, monkeypatch, tmp_path, caplog):
    """Also with a `java` that only prints how to install Java, as on macOS."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(2):
        caplog.clear()
        scores = metric.compute(predictions=["a cat"], references=[["a cat"]])
        assert "meteor" not in scores
        assert scores["bleu_1"] == pytest.approx(1.0)
        assert "METEOR" in caplog.text
        assert "apt-get install" in caplog.text
        (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "java").chmod(0o755)


def test_bad_input_is_named(metric):
    with pytest.raises(ValueError, match="'a dog' .number 1. has no references"):
        metric.compute(predictions=["a cat", "a dog"], references=[["a cat"], []])


@pytest.mark.slow
def test_with_java_scores_are_those_of_the_coco_evaluation(metric, module):
    if not module.java_runs():
        pytest.skip("Java does not run here")
    from pycocoevalcap.eval import Bleu, Cider, Meteor, PTBTokenizer, Rouge

    predictions = ["A dog runs, on the beach.", "two cats aren't here", ""]
    references = [
        ["a dog is running on a beach", "the dog's at the sea"],
        ["two cats are not here"],
        ["an empty room"],
    ]
    scores = metric.compute(predictions=predictions, references=references)
    tokenizer = PTBTokenizer()
    truths = tokenizer.tokenize({i: [{"caption": caption} for caption in each] for i, each in enumerate(references)})
    candidates = tokenizer.tokenize({i: [{"caption": caption}] for i, caption in enumerate(predictions)})
    expected = {"meteor": Meteor(), "rouge_l": Rouge(), "cider": Cider()}
    expected = {name: scorer.compute_score(truths, candidates)[0] for name, scorer in expected.items()}
    expected["bleu_4"] = Bleu(4).compute_score(truths, candidates, verbose=0)[0][3]
    for name, score in expected.items():
        assert scores[name] == pytest.approx(score), name
    assert 0 < scores["meteor"] < 1
    # The rule without Java splits these as PTB does.
    own = metric.compute(predictions=predictions, references=references, use_java=False)
    assert own["bleu_4"] == pytest.approx(scores["bleu_4"])
    assert own["cider"] == pytest.approx(scores["cider"])
