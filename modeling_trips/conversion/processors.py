"""Processors of converted models."""

from tokenizers import normalizers, processors
from transformers import AutoTokenizer, BlipImageProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..configuration_trips import TripsConfig
from ..processing_trips import TripsProcessor


def make_processor(
    tokenizer: PreTrainedTokenizerBase, config: TripsConfig, text_cleaning: str | None = None
) -> TripsProcessor:
    """Make a processor that resizes images to the model's size and uses CLIP's mean and deviation."""
    rows, columns = config.vision_config.grid_size
    patch_height, patch_width = config.vision_config.patch_shape
    if patch_height != patch_width:
        raise ValueError(f"`patch_size` must be square, got {patch_height} x {patch_width} pixels.")
    tokenizer.model_max_length = config.text_config.max_position_embeddings
    image_processor = BlipImageProcessor(size={"height": rows * patch_height, "width": columns * patch_width})
    return TripsProcessor(image_processor, tokenizer, patch_size=patch_height, text_cleaning=text_cleaning)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """
    Load a tokenizer by name or folder, without the truncation stored in its file, which is not a limit of the model.
    One without a token for padding, start or end is a `ValueError`.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    for token in ("pad_token", "cls_token", "sep_token"):
        if getattr(tokenizer, token) is None:
            raise ValueError(f"The tokenizer {name} has no `{token}`. Use a BERT-like tokenizer.")
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
    tokenizer.init_kwargs.pop("max_length", None)
    return tokenizer


def load_albef_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """
    Load the tokenizer of an uncased BERT as ALBEF uses it, without [SEP] after a text. The processor cleans questions
    and captions; answers keep their punctuation.

    Raises:
        ValueError: The tokenizer lacks a special token of BERT.
    """
    tokenizer = load_tokenizer(name)
    special_tokens = {
        f"{key}_token": getattr(tokenizer, f"{key}_token") for key in ("pad", "unk", "cls", "sep", "mask")
    }
    absent = [key for key, token in special_tokens.items() if token is None]
    if absent:
        raise ValueError(f"The tokenizer {name} has no {', '.join(absent)}. Give the tokenizer of a BERT.")
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    first = special_tokens["cls_token"]
    end = special_tokens["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A",
        pair=f"{first} $A {end} $B:1 {end}:1",
        special_tokens=[(first, tokenizer.cls_token_id), (end, tokenizer.sep_token_id)],
    )
    # BertTokenizer would restore its own rules on the next load.
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)
