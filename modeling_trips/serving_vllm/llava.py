"""LLaVA-1.5 on vLLM's own classes, with a tower of CLIP or SigLIP."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.llava import LlavaForConditionalGeneration, LlavaMultiModalProcessor

from ..hosts.layers import SelectionPass
from ..hosts.vlm.families import Llava
from ..hosts.vlm.tower import selecting
from ..hosts.vlm.visual_tokens import VisualTokens
from .selection import SelectingExit, SelectionProcessor, ServedFamily, ServedLayer, serve
from .settings import ServingSettings


class ClipLayer(ServedLayer):
    """Layer of vLLM's CLIP. Its "normed tokens" are queries, keys and values, so scores need no second projection."""

    keys_are_linear = False

    def normed_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.self_attn.qkv_proj(self.layer_norm1(hidden_states))[0]

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        return states.chunk(3, dim=-1)[0].unflatten(-1, (-1, self.self_attn.head_dim))

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        return states.chunk(3, dim=-1)[1].unflatten(-1, (-1, self.self_attn.head_dim)).transpose(1, 2)

    def attend(self, normed: torch.Tensor, attention_mask: None) -> torch.Tensor:
        return self.self_attn.out_proj(self.self_attn.attn(*normed.chunk(3, dim=-1)))[0]

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.layer_norm2(hidden_states))


class SiglipLayer(ClipLayer):
    def forward(self, *args, **kwargs) -> tuple[torch.Tensor, None]:
        output = super().forward(*args, **kwargs)
        return (output, None) if "selection_pass" in kwargs else output  # whole images take the layer's own way


class ServedLlava(ServedFamily, Llava):
    """vLLM's LLaVA. The connector maps patch by patch, so kept patches stay where they are."""

    layer_classes = {"CLIPEncoderLayer": ClipLayer, "SiglipEncoderLayer": SiglipLayer}

    def encode(self, inputs: Mapping, current: SelectionPass | None) -> VisualTokens:
        with selecting(current), self.watching_attention(current):
            groups = self.model.own_features(inputs)
        tokens = VisualTokens.whole(groups)
        if current is None:
            return tokens
        sizes = [self.tokens_per_image] * len(groups)
        if current.attention is not None:
            of_patches: Any = current.attention  # (num_images, num_patches)
            num_others = sizes[0] - of_patches.shape[1]  # the tower's [CLS]
            attention = nn.functional.pad(of_patches, (num_others, 0))
            tokens = replace(tokens, attention=list(attention))
        if not current.records:
            return tokens
        return replace(tokens, sizes=sizes, positions=self.kept_tokens(sizes, inputs, current))


class LlavaProcessor(SelectionProcessor, LlavaMultiModalProcessor):
    def num_kept(self, settings: ServingSettings, size: int) -> int:
        return settings.num_kept(size)  # the tower's [CLS] may be a visual token


class SelectingLlava(SelectingExit):
    """LLaVA-1.5 that drops patches inside its tower, and visual tokens after it."""

    family_class = ServedLlava


TripsLlavaForConditionalGeneration = serve(LlavaForConditionalGeneration, SelectingLlava, LlavaProcessor)
