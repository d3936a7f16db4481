"""A WordPiece tokenizer trained on texts, for runs without a pretrained one; the words of the embedded data."""

from collections.abc import Iterable

from tokenizers.trainers import WordPieceTrainer
from transformers import BertTokenizer


SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# All words of easy-VQA and of scenes, of every task, and of the prompt of captions: models trained on any of them
# share a vocabulary, so that one can start from another.
EMBEDDED_WORDS = """
    a and at black blue both bottom brown circle color column contain does gray green has have image images in is left
    neither no not of one only or picture present rectangle red right row shape teal the there top triangle what yellow
    yes 1 2 3 4 5 6 7 8 , ?
""".split()


def train_wordpiece_tokenizer(texts: Iterable[str], vocab_size: int = 1000) -> BertTokenizer:
    """
    Trains a lower-casing WordPiece tokenizer as BERT's on texts; the same texts always give the same vocabulary.

    Args:
        texts (`Iterable[str]`):
            The texts, such as the questions of a data set.
        vocab_size (`int`, *optional*, defaults to 1000):
            Size of the vocabulary at most, though never fewer than the special tokens, `[PAD]` (id 0), `[UNK]`,
            `[CLS]`, `[SEP]` and `[MASK]`, and twice the characters of the texts: at the start of a word and within.

    Returns:
        `BertTokenizer`: It makes `[CLS] ... [SEP]` of a text, and saves and loads as any other tokenizer.

    Raises:
        `ValueError`: Where the texts have no characters to learn from.
    """
    texts = list(texts)
    backend = BertTokenizer().backend_tokenizer
    alphabet = sorted(
        {
            character
            for text in texts
            for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
            for character in word
        }
    )
    if not alphabet:
        raise ValueError(f"A tokenizer cannot be trained on {len(texts)} texts without a character: give it texts.")
    # The trainer numbers the characters within words in the order of a hash map, another one each run, and breaks ties
    # by these numbers. Given as special tokens they have theirs before it starts.
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + [f"##{character}" for character in alphabet],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=backend.get_vocab(with_added_tokens=False))
