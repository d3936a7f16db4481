"""
Closed formula for the cost of a forward pass of a [`TripsModel`] at a selection schedule: multiply-accumulates (MACs)
of all matrix products and convolutions, equal to those counted by PyTorch's `FlopCounterMode`.
"""

import math
from collections import Counter
from dataclasses import dataclass

from modeling_trips import SelectionSchedule, TripsConfig, TripsFusionConfig, TripsVisionConfig

from ..patch_selection import num_kept_tokens


@dataclass(frozen=True)
class Cost:
    """Cost of an image and its texts."""

    per_image: int  # MACs that all texts of the image share
    per_text: int  # MACs
    tokens: tuple[int, ...]  # image tokens after each vision layer, including [CLS] and fused tokens
    num_kept: int  # patches behind the last selection layer

    def macs(self, texts_per_image: float) -> float:
        """Return the MACs of one image and its texts."""
        return self.per_image + texts_per_image * self.per_text


def forward_cost(config: TripsConfig, text_length: int, schedule: SelectionSchedule | None = None) -> Cost:
    """
    Compute the cost of text encoder, vision tower and fusion encoder, for an image and the texts that share it through
    `image_index`, without heads and decoders.

    Args:
        config ([`TripsConfig`]): Configuration of the model.
        text_length (`int`): Tokens per text, including padding.
        schedule ([`SelectionSchedule`], *optional*): Schedule. Default: that of the configuration.
    """
    schedule = config.vision_config.schedule if schedule is None else schedule
    macs = Counter()
    if config.fusion_encoder_config.fusion_type == "single_stream":
        tokens, num_kept = _count_tower(config.vision_config, schedule, macs, joint_length=text_length)
    else:
        tokens, num_kept = _count_tower(config.vision_config, schedule, macs)
        _count_fusion(
            config.fusion_encoder_config,
            text_length=text_length,
            image_tokens=tokens[-1],
            is_guided_by_text=schedule.first_text_layer is not None,
            macs=macs,
        )
        text = config.text_config
        macs["text"] += text.num_hidden_layers * _layer(text.hidden_size, text.intermediate_size, text_length)
    return Cost(per_image=macs["image"], per_text=macs["text"], tokens=tokens, num_kept=num_kept)


# Fields of a configuration are slow to read, so they are read before the loops below.


def _layer(width: int, mlp_width: int, tokens: int) -> int:
    return _attention(width, tokens) + _mlp(width, mlp_width, tokens)


def _attention(width: int, tokens: int) -> int:
    return 4 * tokens * width**2 + 2 * tokens**2 * width


def _mlp(width: int, mlp_width: int, tokens: int) -> int:
    return 2 * tokens * width * mlp_width


def _patch_embedding(config: TripsVisionConfig) -> int:
    num_patches = math.prod(config.grid_size)
    height, width = config.patch_shape
    if config.patch_embedding_type == "linear":
        return num_patches * config.num_channels * height * width * config.hidden_size
    macs = num_patches * config.hidden_size**2  # the last, 1x1 convolution
    channels = config.num_channels
    for halvings_to_go in reversed(range(height.bit_length() - 1)):
        num_positions = num_patches * 4**halvings_to_go
        out_channels = config.hidden_size // 2**halvings_to_go
        macs += num_positions * 9 * channels * out_channels
        channels = out_channels
    return macs


def _count_tower(
    config: TripsVisionConfig, schedule: SelectionSchedule, macs: Counter, joint_length: int = 0
) -> tuple[tuple[int, ...], int]:
    """
    Add the MACs of the vision tower, or of the joint layers of a single stream with `joint_length` text tokens, which
    run per text. Return the image tokens after each layer, and the patches that the last selection keeps.
    """
    width = config.hidden_size
    mlp_width = config.intermediate_size
    num_fused = 1 if config.fuse_inattentive_tokens else 0
    selecting = schedule.by_layer
    num_kept = math.prod(config.grid_size)
    tokens = 1 + num_kept
    tokens_per_layer = []
    macs["image"] += _patch_embedding(config)
    owner = "text" if joint_length else "image"
    if not joint_length and schedule.first_text_layer and config.guidance_hidden_size not in (None, width):
        macs["text"] += config.guidance_hidden_size * width
    for number in range(1, config.num_hidden_layers + 1):
        macs[owner] += _attention(width, joint_length + tokens)
        if number in selecting:
            selection = selecting[number]
            if selection.guidance == "text" and not joint_length:
                owner = "text"
                macs[owner] += width**2  # the query
            candidates = tokens - 1  # all but [CLS]
            num_kept = num_kept_tokens(candidates, selection.keep_rate)
            if num_kept < candidates:
                tokens = 1 + num_kept + num_fused
                macs[owner] += num_fused * candidates * width
        macs[owner] += _mlp(width, mlp_width, joint_length + tokens)
        tokens_per_layer.append(tokens)
    return tuple(tokens_per_layer), num_kept


def _count_fusion(
    config: TripsFusionConfig, text_length: int, image_tokens: int, is_guided_by_text: bool, macs: Counter
):
    """Add the MACs of the fusion encoder. Keys and values of image tokens that do not depend on a text are shared."""
    width = config.hidden_size
    mlp_width = config.intermediate_size
    image_width = config.cross_attention_hidden_size
    connected_layers = config.connected_layers
    owner = "text" if is_guided_by_text else "image"
    if connected_layers and config.encoder_hidden_size not in (None, width):
        macs[owner] += image_tokens * config.encoder_hidden_size * width
    for number in range(1, config.num_hidden_layers + 1):
        if number in connected_layers:
            owner = "text"
            macs[owner] += _layer(width, mlp_width, text_length + image_tokens)
        else:
            macs[owner] += 2 * image_tokens * image_width * width
            macs["text"] += _layer(width, mlp_width, text_length)
            macs["text"] += 2 * text_length * width**2 + 2 * text_length * image_tokens * width
