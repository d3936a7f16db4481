"""A tiny single stream with random weights, and inputs to call it."""

import torch
from tiny_models import TEXTS

from modeling_trips import (
    TripsConfig,
    TripsForImagesAndTextClassification,
    TripsForQuestionAnswering,
    TripsForVisualGrounding,
    TripsModel,
)


IDS = TEXTS[:4]
MASK = (IDS != 0).long()
HEADS = [TripsForQuestionAnswering, TripsForImagesAndTextClassification, TripsForVisualGrounding]


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.5 * noise if parameter.ndim > 1 else 1 + 0.3 * noise)
    return model.eval()


def make_config(**fields):
    """Return a configuration with 16 patches -> 8 and 1 fused -> ceil(4.5) = 5 and 1 fused."""
    fields = {"schedule": "2:text:0.5,3:text:0.5", **fields}
    return TripsConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": 16,
            "patch_size": 4,
            "hidden_act": "gelu",
        },
        text_config={
            "vocab_size": 20,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 12,
            "hidden_dropout_prob": 0.0,
        },
        decoder_config={"num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2},
        fusion_type="single_stream",
        **fields,
    )


def make_model(attn_implementation="sdpa", model_class=TripsModel, **fields):
    return randomize(model_class._from_config(make_config(**fields), attn_implementation=attn_implementation))
