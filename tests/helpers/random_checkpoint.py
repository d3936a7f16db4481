"""Checkpoints of the tiny preset with random weights and their own vocabulary."""

import torch

from modeling_trips import TripsConfig
from trips_examples.data.vocabulary import train_tokenizer
from trips_examples.training.models import make_processor


def save_random_checkpoint(folder, model_class, texts, **fields):
    """Save a checkpoint whose tokenizer has the words of `texts`; `fields` are those of [`TripsConfig`]."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts)
    fields = {"initializer_range": 0.3, **fields}
    config = TripsConfig.from_preset("tiny", text_config={"vocab_size": len(tokenizer)}, **fields)
    model_class(config).save_pretrained(folder)
    make_processor(tokenizer, config).save_pretrained(folder)
    return folder
