"""The small LLaVA, its scenes (those of commit f838ffd) and its inputs: `benchmarks/vlm_small` of that commit in one file."""

import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import old_scenes
from old_scenes import COLORS, PLACES, SHAPES, draw_scene
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

PATCH_SIZE, IMAGE_SIZE, GRID, NUM_PATCHES = 12, 96, 8, 64
WORDS = ["<pad>", "<bos>", "<eos>", "<image>", *"what color shape is the one where there a ? yes no".split()]
WORDS += [*COLORS, *SHAPES, *PLACES]
IDS = {word: number for number, word in enumerate(WORDS)}
PAD, BOS, EOS, IMAGE = range(4)
NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]


def sine_cosine_positions(rows, columns, width):
    """Wavelengths of 6 to 24 patches, as in `examples/demo.py` of commit f838ffd."""
    frequencies = 2 * torch.pi / (6 * 4 ** torch.linspace(0, 1, width // 4))
    down, right = (torch.arange(length)[:, None] * frequencies for length in (rows, columns))
    down, right = (torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (down, right))
    return torch.cat([down.repeat_interleave(columns, dim=0), right.repeat(rows, 1)], dim=1)


def make_model(seed):
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
        positions[1:] = sine_cosine_positions(GRID, GRID, 128)
    return model


def encode(text):
    return [IDS[word] for word in text.replace("?", " ?").split()]


def pixels_of(image):
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def features_of(model, pixel_values, side=None):
    if side is not None and side * PATCH_SIZE != pixel_values.shape[-1]:
        size = (side * PATCH_SIZE, side * PATCH_SIZE)
        pixel_values = nn.functional.interpolate(pixel_values, size=size, mode="bicubic", antialias=True)
    output = model.model.vision_tower(pixel_values, interpolate_pos_encoding=True)
    return model.model.multi_modal_projector(output.last_hidden_state[:, 1:]), output.pooler_output


def llava_inputs(pixel_values, prompts, num_visual=NUM_PATCHES):
    length = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (length - len(words)) + [BOS] + [IMAGE] * num_visual + words for words in prompts])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixel_values}
