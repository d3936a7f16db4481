"""A tiny model for pre-training and a batch of five captions of three images."""

import torch
from tiny_models import TEXTS

from modeling_trips import TripsConfig, TripsForPreTraining


# The paper's schedule, and one with layers scored by the image before a last layer scored by the text.
SCHEDULES = [
    {},
    {"schedule": "2:image:0.7,3:image:0.7,4:text:0.3"},
]
WEIGHTS = {"itc_weight": 0.5, "itm_weight": 2.0, "mlm_weight": 3.0, "prefix_lm_weight": 5.0}


def make_model(text_width=32, **fields):
    torch.manual_seed(0)
    config = TripsConfig.from_preset(
        "tiny",
        vision_config={"hidden_size": 32, "intermediate_size": 48, "image_size": 32, "patch_embedding_type": "linear"},
        text_config={
            "vocab_size": 20,
            "hidden_size": text_width,
            "intermediate_size": 48,
            "max_position_embeddings": 12,
        },
        projection_dim=8,
        **{**WEIGHTS, **fields},
    )
    return TripsForPreTraining(config).eval()


def make_batch():
    """Five captions of three images. Two tokens are masked, none in the last caption; each caption is cut in two."""
    texts = TEXTS[:5]
    masked, labels = texts.clone(), torch.full_like(texts, -100)
    for row, column in ((0, 2), (0, 3), (1, 1), (2, 1), (3, 2)):
        labels[row, column], masked[row, column] = texts[row, column], 19
    return {
        "input_ids": texts,
        "attention_mask": (texts != 0).long(),
        "pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
        "image_index": torch.tensor([0, 0, 1, 2, 1]),
        "image_ids": torch.tensor([4, 9, 6]),
        "mlm_input_ids": masked,
        "mlm_labels": labels,
        "prompt_input_ids": texts[:, :3],
        "prompt_attention_mask": (texts[:, :3] != 0).long(),
        "labels": torch.tensor([[9, 2], [2, -100], [2, -100], [2, -100], [8, 2]]),
    }
