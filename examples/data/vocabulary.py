"""Training of a WordPiece tokenizer for runs without a pretrained one; words of the bundled synthetic data."""

from collections.abc import Iterable

from tokenizers.trainers import WordPieceTrainer
from transformers import BertTokenizer


SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# The vocabulary of the models that ship, in their order: all words of the bundled scenes and of the captioning prompt,
# and some of older scenes. Models of all tasks share it, so that one can start from another.
BUNDLED_WORDS = """
    a and at black blue both bottom brown circle color column contain does gray green has have image images in is left
    neither no not of one only or picture present rectangle red right row shape teal the there top triangle what yellow
    yes 1 2 3 4 5 6 7 8 , ? orange purple pink cyan star cross diamond square where topleft topright bottomleft
    bottomright
""".split()


def train_wordpiece_tokenizer(texts: Iterable[str], vocab_size: int = 1000) -> BertTokenizer:
    """
    Train a lower-casing WordPiece tokenizer like BERT's. Equal texts give an equal vocabulary.

    Args:
        texts (`Iterable[str]`)
        vocab_size (`int`, *optional*, defaults to 1000):
            Largest size of the vocabulary. It always contains the special tokens `[PAD]` (id 0), `[UNK]`, `[CLS]`,
            `[SEP]` and `[MASK]`, and each character of the texts twice: at the start of a word and within.

    Raises:
        `ValueError`: The texts have no characters.
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
        raise ValueError(f"A tokenizer cannot be trained on {len(texts)} texts without a character.")
    # The trainer numbers the characters within words in the random order of a hash map and breaks ties by number.
    # Passing them as special tokens fixes their numbers.
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + [f"##{character}" for character in alphabet],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=backend.get_vocab(with_added_tokens=False))
