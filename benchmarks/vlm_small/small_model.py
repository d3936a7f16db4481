"""Configuration, vocabulary and inputs of the small LLaVA."""

import numpy as np
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from trips_examples.data.busy_scenes import CELL_SIZE, COLORS, PLACES, SHAPES
from trips_examples.demo import sine_cosine_positions


PATCH_SIZE = 12
IMAGE_SIZE = 4 * CELL_SIZE
GRID = IMAGE_SIZE // PATCH_SIZE
NUM_PATCHES = GRID * GRID
WORDS = ["<pad>", "<bos>", "<eos>", "<image>", *"what color shape is the one where there a ? yes no".split()]
WORDS += [*COLORS, *SHAPES, *PLACES]
IDS = {word: number for number, word in enumerate(WORDS)}
PAD, BOS, EOS, IMAGE = range(4)
ATTENTION_LAYER = 2  # decoder layer (from 1) of FastV's rule
NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]


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
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():
        positions[1:] = sine_cosine_positions(GRID, GRID, config.vision_config.hidden_size)
    return model


def encode(text: str) -> list[int]:
    return [IDS[word] for word in text.replace("?", " ?").split()]


def pixels_of(image) -> torch.Tensor:
    """Convert an image to `(3, height, width)` from -1 to 1."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def features_of(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor, side: int | None = None):
    """
    Return visual tokens `(batch_size, num_tokens, hidden_size)` and [CLS] `(batch_size, hidden_size)` of the tower.

    Args:
        side (`int`, *optional*): Patches along each side. Images of another size are scaled. Default: as they are.
    """
    if side is not None and side * PATCH_SIZE != pixel_values.shape[-1]:
        size = (side * PATCH_SIZE, side * PATCH_SIZE)
        pixel_values = nn.functional.interpolate(pixel_values, size=size, mode="bicubic", antialias=True)
    output = model.model.vision_tower(pixel_values, interpolate_pos_encoding=True)
    return model.model.multi_modal_projector(output.last_hidden_state[:, 1:]), output.pooler_output


def llava_inputs(pixel_values: torch.Tensor, prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Return inputs of the model for images of `NUM_PATCHES` patches. Prompts follow, padded on the left."""
    length = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (length - len(words)) + [BOS] + [IMAGE] * NUM_PATCHES + words for words in prompts])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixel_values}
