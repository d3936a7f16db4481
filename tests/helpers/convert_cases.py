"""Calls of examples/convert_checkpoint.py, and texts for the converted models."""

from trips_examples import convert_checkpoint
from trips_examples.data.vocabulary import train_wordpiece_tokenizer


TEXTS = [
    "What's the man-made thing on the left/right side?",
    "Is it (really) a RED circle; or not...",
    'a <Person> says "hello" #2: yes!',
    "Café * plain ~ text",
]


def make_tokenizer():
    """Return a tokenizer with all words of `TEXTS`."""
    return train_wordpiece_tokenizer([*TEXTS, "a person", "whats its"])


def convert(arguments, **others):
    argv = []
    for name, value in {**arguments, **others}.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return convert_checkpoint.main(argv)
