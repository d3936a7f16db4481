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
"""Patch selection in timm's `VisionTransformer`."""

import torch
from timm.models.vision_transformer import Attention, Block, VisionTransformer

from .layers import ModelParts, SelectionLayer, project_part


class TimmSelectionLayer(SelectionLayer, Block):
    def normed_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm1(hidden_states)

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        return self.attn.q_norm(project_part(self.attn, states, 0))

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        return self.attn.k_norm(project_part(self.attn, states, 1).transpose(1, 2))

    @property
    def scaling(self) -> float:
        return self.attn.scale

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("`attn_mask` and `is_causal` are not supported with patch selection.")
        normed = self.normed_tokens(x)
        x = x + self.drop_path1(self.ls1(self.attn(normed)))
        x = self.select(x, self.score(normed, None))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def describe_timm(model: VisionTransformer) -> ModelParts:
    for number, block in enumerate(model.blocks, start=1):
        if isinstance(block, Block) and type(block.attn) is not Attention:
            name = type(block.attn).__name__
            raise TypeError(f"The attention of layer {number} must be timm.layers.Attention, got {name}.")
    return ModelParts(
        model.blocks,
        Block,
        TimmSelectionLayer,
        num_selectable_layers=len(model.blocks),
        num_prefix_tokens=model.num_prefix_tokens,
        has_class_token=model.has_class_token,
        no_text="its forward pass takes only pixels",
    )
