"""LLaVA-1.5 on vLLM's own classes, with a tower of CLIP or SigLIP."""

import torch
from vllm.model_executor.models.llava import LlavaForConditionalGeneration, LlavaMultiModalProcessor

from ..hosts.vlm.families import Llava
from .selection import SelectingExit, SelectionProcessor, ServedFamily, ServedLayer, serve
from .settings import ServingSettings


class ClipLayer(ServedLayer):
    """Layer of vLLM's CLIP. Its "normed tokens" are queries, keys and values, so scores need no second projection."""

    norms = ("layer_norm1", "layer_norm2")
    keys_are_linear = False

    def normed_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = super().normed_tokens(hidden_states)
        stacked, _ = self.self_attn.qkv_proj(normed)
        return stacked

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        query, _, _ = states.chunk(3, dim=-1)
        return query.unflatten(-1, (-1, self.self_attn.head_dim))

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        _, key, _ = states.chunk(3, dim=-1)
        key = key.unflatten(-1, (-1, self.self_attn.head_dim))
        return key.transpose(1, 2)

    def attend(self, normed: torch.Tensor, attention_mask: None) -> torch.Tensor:
        parts = normed.chunk(3, dim=-1)
        attended = self.self_attn.attn(*parts)
        attn_output, _ = self.self_attn.out_proj(attended)
        return attn_output


class SiglipLayer(ClipLayer):
    def forward(self, *args, **kwargs) -> tuple[torch.Tensor, None]:
        output = super().forward(*args, **kwargs)
        return (output, None) if "selection_pass" in kwargs else output  # whole images take the layer's own way


class ServedLlava(ServedFamily, Llava):
    layer_classes = {"CLIPEncoderLayer": ClipLayer, "SiglipEncoderLayer": SiglipLayer}


class LlavaProcessor(SelectionProcessor, LlavaMultiModalProcessor):
    def num_kept(self, settings: ServingSettings, size: int) -> int:
        return settings.num_kept(size)  # the tower's [CLS] may be a visual token


class SelectingLlava(SelectingExit):
    """LLaVA-1.5 that drops patches inside its tower, and visual tokens after it."""

    family_class = ServedLlava


TripsLlavaForConditionalGeneration = serve(LlavaForConditionalGeneration, SelectingLlava, LlavaProcessor)
