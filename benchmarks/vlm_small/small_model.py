"""Configuration, vocabulary and inputs of the small LLaVA."""

import numpy as np
import torch
from busy_scenes import IMAGE_SIZE, vocabulary
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration


PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
NUM_PATCHES = GRID * GRID
WORDS = ["<pad>", "<bos>", "<eos>", "<image>", *vocabulary()]
IDS = {word: number for number, word in enumerate(WORDS)}
PAD, BOS, EOS, IMAGE = range(4)
ATTENTION_LAYER = 2  # decoder layer (from 1) for attention supervision and for FastV's rule


def make_model(seed: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_act="gelu",
        ),
        text_config=LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            tie_word_embeddings=True,
        ),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        image_seq_length=NUM_PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    # At the usual scale of 0.02, positions learn too slowly.
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.1)
    return model


def encode(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def pixels_of(image) -> torch.Tensor:
    """Convert an image to `(3, height, width)` from -1 to 1."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
