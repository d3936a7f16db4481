"""Training of a tokenizer for runs without a pretrained one; words of the bundled synthetic data."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast


SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# Marks, each with the space before it, and Han characters are split from their words.
SPLIT = Regex(r"▁?[\p{P}$+<=>^`|~]|\p{Han}")

# All words of the bundled scenes and of the captioning prompt. Models of all tasks share them, so that one can start
# from another.
BUNDLED_WORDS = """
    a bar blue both circle color cross cyan dash diamond do does dot green has have if image images in is left mark me
    neither no of on one only or orange picture pink purple red right ring see shape square star tell the there
    triangle what which with yellow yes you , ?
""".split()


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1000) -> PreTrainedTokenizerFast:
    """
    Train a tokenizer whose `decode` returns a text as it was written: byte-pair encoding of characters, with spaces as
    part of the words, as in SentencePiece. Punctuation marks and Han characters are split from words. Texts are
    composed (Unicode NFC), stripped, and lower-cased if none of `texts` has an upper-case letter. Equal texts give an
    equal vocabulary. It adds `[CLS]` and `[SEP]` around a text as BERT's does.

    Args:
        texts (`Iterable[str]`): Texts to train on. A `ValueError` is raised if they have no characters.
        vocab_size (`int`, *optional*, defaults to 1000): Largest size of the vocabulary. It always contains the
            special tokens `[PAD]` (id 0), `[UNK]`, `[CLS]`, `[SEP]` and `[MASK]`, and each character of the texts.
    """
    texts = list(texts)
    if not any(text.strip() for text in texts):
        raise ValueError(f"A tokenizer cannot be trained on {len(texts)} texts without a character.")
    backend = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"], fuse_unk=True))
    steps = [normalizers.NFC(), normalizers.Strip()]
    if all(text == text.lower() for text in texts):
        steps.append(normalizers.Lowercase())
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(SPLIT, "isolated")]
    )
    backend.decoder = decoders.Metaspace()
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS.values()), show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", backend.token_to_id("[CLS]")), ("[SEP]", backend.token_to_id("[SEP]"))],
    )
    # A text such as "[SEP]" is encoded by its characters.
    return PreTrainedTokenizerFast(tokenizer_object=backend, split_special_tokens=True, **SPECIAL_TOKENS)
