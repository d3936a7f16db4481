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
"""Patch selection in the vision towers of CLIP, SigLIP, BLIP and BridgeTower."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.blip.modeling_blip import BlipEncoderLayer
from transformers.models.blip_2.modeling_blip_2 import Blip2EncoderLayer
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerResidualAttention
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.instructblip.modeling_instructblip import InstructBlipEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from .layers import ModelParts, SelectionLayer, SeparateProjections, project_part


class ClipSelectionLayer(SeparateProjections, SelectionLayer, CLIPEncoderLayer):
    pass


class SiglipSelectionLayer(SeparateProjections, SelectionLayer, SiglipEncoderLayer):
    pass


class StackedProjections(SeparateProjections):
    """Layer of BLIP's form: one linear layer for queries, keys and values."""

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        return project_part(self.self_attn, states, 0)

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        return project_part(self.self_attn, states, 1).transpose(1, 2)


class BlipSelectionLayer(StackedProjections, SelectionLayer, BlipEncoderLayer):
    pass


class Blip2SelectionLayer(StackedProjections, SelectionLayer, Blip2EncoderLayer):
    pass


class InstructBlipSelectionLayer(StackedProjections, SelectionLayer, InstructBlipEncoderLayer):
    pass


# Selection layers of the towers whose layers have CLIP's form.
TOWERS: dict[type[nn.Module], type[SelectionLayer]] = {
    CLIPEncoderLayer: ClipSelectionLayer,
    SiglipEncoderLayer: SiglipSelectionLayer,
    BlipEncoderLayer: BlipSelectionLayer,
    Blip2EncoderLayer: Blip2SelectionLayer,
    InstructBlipEncoderLayer: InstructBlipSelectionLayer,
}


class BridgeTowerSelectionLayer(SelectionLayer, BridgeTowerResidualAttention):
    """Selection layer for sequence-first states: `(seq_length, batch_size, hidden_size)`."""

    def normed_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.ln_1(hidden_states).transpose(0, 1)

    def project(self, states: torch.Tensor, part: int) -> torch.Tensor:
        weight = self.attn.in_proj_weight.chunk(3)[part]
        bias = self.attn.in_proj_bias.chunk(3)[part]
        return nn.functional.linear(states, weight, bias).unflatten(-1, (self.attn.num_heads, self.attn.head_dim))

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        return self.project(states, 0)

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        return self.project(states, 1).transpose(1, 2)

    @property
    def scaling(self) -> float:
        return self.attn.head_dim**-0.5

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        normed = self.normed_tokens(hidden_state)
        residual_state = hidden_state + self.attention(normed.transpose(0, 1), None)
        residual_state = self.select(residual_state.transpose(0, 1), self.score(normed, None)).transpose(0, 1)
        hidden_state = self.ln_2(residual_state)
        for layer in self.mlp.values():
            hidden_state = layer(hidden_state)
        return residual_state + hidden_state


def _no_text_for_width(model: PreTrainedModel) -> str | None:
    """Return why the text cannot score patches if the towers differ in width, or None. A bare tower has no check."""
    text_config = getattr(model.config, "text_config", None)
    vision_config = getattr(model.config, "vision_config", model.config)
    if text_config is None or text_config.hidden_size == vision_config.hidden_size:
        return None
    return (
        f"its text encoder has width {text_config.hidden_size} and its vision tower width {vision_config.hidden_size}"
    )


def describe_tower(model: PreTrainedModel) -> ModelParts:
    """
    Describe a vision tower that gets its text from the caller, or a model that holds one.

    Raises:
        TypeError: The layers are not supported.
    """
    layers = getattr(model, "vision_model", model).encoder.layers
    layer_class = next((known for known in TOWERS if isinstance(layers[0], known)), None)
    if layer_class is None:
        raise TypeError(f"Patch selection does not support layers of class {type(layers[0]).__name__}.")
    has_class_token = layer_class is not SiglipEncoderLayer
    return ModelParts(
        layers,
        layer_class,
        TOWERS[layer_class],
        num_selectable_layers=len(layers),
        num_prefix_tokens=int(has_class_token),
        has_class_token=has_class_token,
        no_text=_no_text_for_width(model),
    )


def describe_bridgetower(model: PreTrainedModel) -> ModelParts:
    model = getattr(model, "bridgetower", model)
    layers = model.vision_model.visual.transformer.resblocks
    # From this layer on, image tokens are added to those of the cross-modal layers, token by token.
    first_bridge = len(model.text_model.encoder.layer) - model.config.num_hidden_layers + 1
    return ModelParts(
        layers,
        BridgeTowerResidualAttention,
        BridgeTowerSelectionLayer,
        num_selectable_layers=first_bridge,
        no_text="its vision layers get only image tokens",
    )
