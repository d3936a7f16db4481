"""BLEU, METEOR, ROUGE-L and CIDEr of captions as an `evaluate` metric, with COCO's scorers in pycocoevalcap.

With Java, COCO's PTB tokenizer splits the words of captions in Latin letters, and scores equal those of
`pycocoevalcap.eval.COCOEvalCap`. [`split_words`] splits captions in other scripts, which PTB does not know, and all
captions without Java, where METEOR is missing, and scores of captions with unusual punctuation differ slightly from
published ones. The metric needs no network, also by `evaluate.load("examples/metrics/caption_metrics.py")`.
"""

import logging
import subprocess
import unicodedata

import datasets
import evaluate
import regex
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer


logger = logging.getLogger(__name__)

# A character of a script without spaces between words, or a word. Other characters are removed, as COCO's evaluation
# does with punctuation.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}--\p{M}]\p{M}*"
_LETTERS = r"(?:[\p{L}\p{M}\p{N}--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]])+"
_WORD = regex.compile(rf"{_UNSPACED}|{_LETTERS}(?:[.,:/'’\-]{_LETTERS})*", regex.V1)
_NOT_LATIN = regex.compile(r"[\p{L}--[\p{Latin}\p{Common}]]", regex.V1)
# The endings that PTB splits off.
_ENDING = regex.compile(r"(?:n['’]t|['’](?:s|m|d|re|ve|ll))$")


def split_words(caption: str) -> str:
    """
    Return the lower-cased words of a caption, separated by spaces, as PTB does for plain sentences. Each character is
    a word in scripts that are written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese).
    """
    caption = unicodedata.normalize("NFC", caption).lower()
    words = []
    for word in _WORD.findall(caption):
        ending = _ENDING.search(word)
        if ending is None or ending.start() == 0:
            words.append(word)
        else:
            words += [word[: ending.start()], ending.group()]
    return " ".join(words)


def java_runs() -> bool:
    """Return whether Java starts. On some systems `java` only prints how to install it."""
    try:
        return subprocess.run(["java", "-version"], capture_output=True).returncode == 0
    except OSError:
        return False


def _tokenized(captions: list[list[str]], use_java: bool) -> dict[int, list[str]]:
    words: dict[int, list[str]] = {}
    if use_java:
        entries = {image: [{"caption": text} for text in texts] for image, texts in enumerate(captions)}
        words = PTBTokenizer().tokenize(entries)
    else:
        words = {image: list(texts) for image, texts in enumerate(captions)}
    for image, texts in enumerate(captions):
        for number, caption in enumerate(texts):
            if not use_java or _NOT_LATIN.search(caption):
                words[image][number] = split_words(caption)
    return words


class CaptionMetrics(evaluate.Metric):
    """
    BLEU, METEOR, ROUGE-L and CIDEr of image captions with one or more references each.

    Args:
        predictions (`list[str]`): A caption of each image.
        references (`list[list[str]]`): The true captions of each image, at least one.
        use_java (`bool`, *optional*): Whether to use Java. By default, if it is installed.

    Returns:
        `dict`: `bleu_1` to `bleu_4`, `rouge_l` and, with Java, `meteor`, in [0, 1]; `cider`, in [0, 10] (tables often
        show 100 times these numbers). CIDEr is 0 for a single image, because it weights words by their frequency over
        images.

    Raises:
        `ValueError`: There are no predictions, or an image has no references.

    Example:

    >>> metric = evaluate.load("examples/metrics/caption_metrics.py")
    >>> metric.compute(predictions=["a cat"], references=[["a black cat", "the cat"]], use_java=False)["bleu_1"]
    0.9999999...
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="arXiv 1504.00325",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], use_java: bool | None = None
    ) -> dict[str, float]:
        if not predictions:
            raise ValueError("There are no predictions. Give at least one.")
        for number, (prediction, captions) in enumerate(zip(predictions, references)):
            if not captions:
                raise ValueError(f"The prediction {prediction!r} (number {number}) has no references. Give one.")
        if use_java is None:
            use_java = java_runs()
            if not use_java:
                logger.warning(
                    "Java does not run: METEOR is left out, and words are split by a simpler rule than in published "
                    "scores. Install Java (apt-get install default-jre-headless, conda install openjdk, brew install "
                    "openjdk) and evaluate again, or score predictions.jsonl elsewhere."
                )
        candidates = _tokenized([[prediction] for prediction in predictions], use_java)
        truths = _tokenized(references, use_java)
        bleu, _ = Bleu(4).compute_score(truths, candidates, verbose=0)
        scores = {f"bleu_{n}": float(score) for n, score in enumerate(bleu, start=1)}
        scorers = {"rouge_l": Rouge(), "cider": Cider()}
        if use_java:
            scorers["meteor"] = Meteor()
        for name, scorer in scorers.items():
            score, _ = scorer.compute_score(truths, candidates)
            scores[name] = float(score)
        return scores
