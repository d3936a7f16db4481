"""A tiny vision tower with random parameters, and its inputs."""

import torch

from modeling_trips import TripsVisionConfig, TripsVisionModel


SIZES = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
GRID = {"image_size": [12, 8], "patch_size": 4}  # 3 x 2 patches
CLIP_STYLE = {"use_pre_layernorm": True, "hidden_act": "quick_gelu", "patch_bias": False, "layer_norm_eps": 1e-5}


def make_model(attn_implementation="sdpa", **fields):
    """Return a tower with random parameters, including biases and norms."""
    config = TripsVisionConfig(**{**SIZES, **GRID, "schedule": "2:text:0.5", **fields})
    model = TripsVisionModel._from_config(config, attn_implementation=attn_implementation).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm_weight = "norm" in name and "weight" in name
            parameter.copy_(1 + 0.2 * noise if is_norm_weight else 0.4 * noise)
    return model


def images(count=2, size=(12, 8), dtype=torch.float32):
    height, width = size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def texts(count=2, width=8, dtype=torch.float32):
    states = torch.randn(count, width, generator=torch.Generator().manual_seed(2))
    return 2 * states.to(dtype)
