"""A processor with a vocabulary of twelve words and images of 32 x 32 pixels."""

from transformers import BertTokenizer, BlipImageProcessor

from modeling_trips.processing_trips import TripsProcessor


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "red", "this", "?", "a", "cat"]
VOCABULARY = {word: index for index, word in enumerate(WORDS)}
PAD, CLS, SEP = VOCABULARY["[PAD]"], VOCABULARY["[CLS]"], VOCABULARY["[SEP]"]


def make_bert_tokenizer(texts, **options):
    """Return a tokenizer as BERT's (uncased) that knows the words of texts."""
    tools = BertTokenizer().backend_tokenizer
    words = [tools.pre_tokenizer.pre_tokenize_str(tools.normalizer.normalize_str(text)) for text in texts]
    words = [*WORDS[:5], *dict.fromkeys(word for text in words for word, _ in text)]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, **options)


def make_processor(image_processor=None, patch_size=16, **tokenizer_kwargs):
    tokenizer = BertTokenizer(vocab=VOCABULARY, **{"model_max_length": 12, **tokenizer_kwargs})
    if image_processor is None:
        image_processor = BlipImageProcessor(size={"height": 32, "width": 32})
    return TripsProcessor(image_processor, tokenizer, patch_size=patch_size)
