"""Calls of examples/convert_checkpoint.py, and texts for the converted models."""

from tiny_processors import make_bert_tokenizer

from trips_examples import convert_checkpoint


TEXTS = [
    "What's the man-made thing on the left/right side?",
    "Is it (really) a RED circle; or not...",
    'a <Person> says "hello" #2: yes!',
    "Café * plain ~ text",
]


def make_tokenizer():
    """Return a tokenizer with all words of `TEXTS`."""
    return make_bert_tokenizer([*TEXTS, "a person", "whats its"])


def convert(arguments, **others):
    argv = []
    for name, value in {**arguments, **others}.items():
        argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return convert_checkpoint.main(argv)
