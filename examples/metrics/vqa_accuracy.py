"""VQA accuracy as an `evaluate` metric, by the rule of VQAv2's official evaluation script.

The rule is that of Antol et al. 2015 (arXiv 1505.00468), as in `vqaEval.py` of https://github.com/GT-Vision-Lab/VQA:
the mean of min(matches / 3, 1) over the leave-one-out subsets of the annotators, with normalized answers if the
annotators disagree. Questions with one answer are scored by exact match of normalized answers, and the result has
another name. Accuracies are in [0, 1]. The metric needs no network, also by
`evaluate.load("examples/metrics/vqa_accuracy.py")`.
"""

import functools
import re
import unicodedata
from collections import Counter, defaultdict
from statistics import fmean

import datasets
import evaluate


_NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = {"a", "an", "the"}

# The contractions of the official script, which repairs them if exactly one apostrophe is missing.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _repairs() -> dict[str, str]:
    """Return each contraction by what is left of it without one of its apostrophes."""
    repairs = {}
    for word in _CONTRACTIONS:
        for mark in re.finditer("'", word):
            repairs[word[: mark.start()] + word[mark.end() :]] = word
    repairs["somebody'd"] = "somebodyd"  # the only entry of the official table that removes an apostrophe
    return repairs


_REPAIRS = _repairs()

_PUNCTUATION = re.compile(r'[;/\[\]"{}()=+\\_\-><@`,?!]')
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _strip_punctuation(text: str) -> str:
    # As in the official script, a mark that touches a space anywhere in the text is removed everywhere.
    has_digit_comma = _DIGIT_COMMA.search(text) is not None
    replacements = {}
    for mark in set(_PUNCTUATION.findall(text)):
        is_spaced = f"{mark} " in text or f" {mark}" in text
        replacements[mark] = "" if is_spaced or has_digit_comma else " "
    text = _PUNCTUATION.sub(lambda match: replacements[match.group()], text)
    return _PERIOD.sub("", text)


@functools.lru_cache(maxsize=2**16)  # most answers of a data set repeat
def normalize_answer(text: str) -> str:
    """
    Normalize an answer as the evaluation script of VQAv2 does: "The two dogs." becomes "2 dogs".

    Punctuation is removed, except apostrophes, colons and the periods of decimal numbers. Number words up to ten
    become digits, articles are removed, missing apostrophes of contractions are added, and the text is lower-cased.
    """
    text = _strip_punctuation(_on_one_line(text))
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_REPAIRS.get(word, word) for word in words if word not in _ARTICLES)


def exact_match(prediction: str, answer: str) -> float:
    """
    Return 1 if the normalized answers are equal, else 0. It is the score of questions with one answer. Unicode's
    composed and decomposed characters are equal, and answers of punctuation or an article alone are compared as they
    are.
    """
    return float(_comparable(prediction) == _comparable(answer))


def _comparable(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    return normalize_answer(text) or text.strip().lower()


def vqa_accuracy(prediction: str, answers: list[str]) -> float:
    """
    Score one prediction by the rule of VQAv2: the mean over the annotators of min(matches among the others / 3, 1).

    With ten annotators of whom 1, 2, 3 or at least 4 agree with the prediction, the score is 0.3, 0.6, 0.9 or 1, and a
    unanimous answer of two or three scores 1/3 or 2/3. As in the official script, answers are only normalized if the
    annotators disagree. Without answers, a `ValueError` is raised.
    """
    if not answers:
        raise ValueError(f"The prediction {prediction!r} has no reference answers. Give at least one.")
    prediction = _on_one_line(prediction)
    answers = [_on_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction = normalize_answer(prediction)
        answers = [normalize_answer(answer) for answer in answers]
    matches = answers.count(prediction)
    agreeing = matches * min((matches - 1) / 3, 1)
    disagreeing = (len(answers) - matches) * min(matches / 3, 1)
    return (agreeing + disagreeing) / len(answers)


def answer_score(prediction: str, answers: list[str]) -> float:
    """Return `exact_match` for a single answer, and `vqa_accuracy` for several."""
    return exact_match(prediction, answers[0]) if len(answers) == 1 else vqa_accuracy(prediction, answers)


def most_common_answer(answers: list[str]) -> str:
    """Return the normalized answer of most annotators, the first one of a tie."""
    return Counter(map(normalize_answer, answers)).most_common(1)[0][0]


class VqaAccuracy(evaluate.Metric):
    """
    Accuracy of open-ended visual question answering with the answers of one or more annotators.

    Args:
        predictions (`list[str]`): The model's answer to each question.
        references (`list[list[str]]`): The annotators' answers to each question, at least one.

    Returns:
        `dict`: `accuracy`, the mean score in [0, 1]; `vqa_accuracy`, the mean over the questions with several answers;
        and `exact_match`, the mean over those with one.

    Raises:
        `ValueError`: There are no predictions, or a question has no answers.

    Example:

    >>> metric = evaluate.load("examples/metrics/vqa_accuracy.py")
    >>> metric.compute(predictions=["Two", "a dog"], references=[["2"], ["cat"]])
    {'accuracy': 0.5, 'exact_match': 0.5}
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="arXiv 1505.00468",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        scores = []
        scores_by_rule = defaultdict(list)
        for prediction, answers in zip(predictions, references, strict=True):
            score = answer_score(prediction, answers)
            rule = "exact_match" if len(answers) == 1 else "vqa_accuracy"
            scores.append(score)
            scores_by_rule[rule].append(score)
        results = {"accuracy": fmean(scores)}
        for rule, scores_of_rule in scores_by_rule.items():
            results[rule] = fmean(scores_of_rule)
        return results
