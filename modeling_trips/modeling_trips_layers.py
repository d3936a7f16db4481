# Copyright 2026 The TRIPS for Transformers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What all models of TRIPS share: attention and masks, and how a checkpoint is saved with its code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring

from .configuration_trips import TripsConfig


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()
    return attn_output, attn_weights


def bidirectional_mask(config: PreTrainedConfig, attention_mask: torch.Tensor | None, **kwargs):
    """
    Transformers' `create_bidirectional_mask`, but where there is a mask of padding it is used: looking whether it
    hides anything would sync with the host.
    """
    return create_bidirectional_mask(
        config=config, attention_mask=attention_mask, allow_is_bidirectional_skip=attention_mask is None, **kwargs
    )


def joint_padding_mask(*masks_and_lengths: tuple[torch.Tensor | None, int]) -> torch.Tensor | None:
    """
    The mask of a sequence that is joined of several, each given as its own mask, or `None` where none of its tokens is
    padding, and its length. `None` if no part has any.
    """
    given = next((mask for mask, _ in masks_and_lengths if mask is not None), None)
    if given is None:
        return None
    # Of `len(given)`, an exported program would make a constant.
    parts = [
        given.new_ones(given.shape[0], length) if mask is None else mask.to(given)
        for mask, length in masks_and_lengths
    ]
    return torch.cat(parts, dim=1)


@auto_docstring
class TripsPreTrainedModel(PreTrainedModel):
    config: TripsConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "TripsVisionEmbeddings",
        "TripsTextEmbeddings",
        "TripsVisionLayer",
        "TripsTextLayer",
        "TripsCrossLayer",
        "TripsJointLayer",
        "TripsConnectedLayer",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # Notes in the configuration where a checkpoint's code is: set by `registration_trips`, which imports every class.
    describe_code: ClassVar[Callable[[PreTrainedModel], None]]

    def unused_parameters(self) -> list[nn.Parameter]:
        """
        Those that get no gradient with this configuration: freeze them where data parallel training is told not to
        look for unused parameters, or it waits for their gradients.
        """
        parts = [module for module in self.children() if isinstance(module, TripsPreTrainedModel)]
        return [parameter for part in parts for parameter in part.unused_parameters()]

    def save_pretrained(self, save_directory, **kwargs):
        """As in Transformers. The folder gets the code of every class of this project, and names no other code."""
        self.describe_code()
        with _named_as_registered(type(self)):
            # A part that was loaded from a whole model is saved under its own names.
            super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})


def class_before_sharding(cls: type) -> type:
    """FSDP makes a class of its own for a model that it shards: the one that this was made from; `cls` otherwise."""
    return next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))


@contextmanager
def _named_as_registered(cls: type[TripsPreTrainedModel]) -> Iterator[None]:
    """
    By a class's module and name, Transformers finds the code to copy into a checkpoint, and names the class there. The
    module that imports every class brings the code of all.
    """
    original, names = class_before_sharding(cls), (cls.__module__, cls.__name__)
    cls.__module__, cls.__name__ = cls.describe_code.__module__, original.__name__
    try:
        yield
    finally:
        cls.__module__, cls.__name__ = names


def check_counts(num_texts: int, num_images: int, image_index: torch.LongTensor | None):
    if image_index is None and num_texts != num_images:
        raise ValueError(
            f"Got {num_texts} texts for {num_images} images. Give as many images as texts, or say with `image_index` "
            "which image each text looks at."
        )
    if image_index is not None and tuple(image_index.shape) != (num_texts,):
        raise ValueError(
            f"`image_index` must have shape ({num_texts},), one entry per text, got {tuple(image_index.shape)}."
        )


def check_image_index(image_index: torch.LongTensor, num_images: int):
    """Its values: not within a forward pass, where no shape or branch may depend on them."""
    outside = ((image_index < 0) | (image_index >= num_images)).nonzero()
    if len(outside):
        position = outside[0, 0].item()
        raise ValueError(
            f"`image_index[{position}]` is {image_index[position].item()}, but must be in [0, {num_images - 1}]."
        )


def check_text_length(length: int, max_length: int):
    if length > max_length:
        raise ValueError(f"The text has {length} tokens, `max_position_embeddings` allows {max_length}.")


def check_image_source(pixel_values: torch.Tensor | None, prefix: object | None):
    if (pixel_values is None) == (prefix is None):
        found = "neither: give an image" if prefix is None else "both"
        raise ValueError(f"Specify exactly one of `pixel_values` and `prefix`, got {found}.")


__all__ = ["TripsPreTrainedModel", "class_before_sharding"]
