"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and its mixture of experts, on vLLM's own classes."""

from collections.abc import Sequence

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ..hosts.layers import ModuleWrapper, SelectionPass
from ..hosts.vlm.families import Qwen2Vl, Qwen3Vl, Qwen25Vl, restore_merged
from ..hosts.vlm.tower import PackedLayer
from .positions import PlacedExit, PlacedFamily, PlacedProcessor
from .selection import ServedLayer, serve


class QwenLayer(ServedLayer, PackedLayer):
    """Layer of vLLM's tower, whose sequence of patches has a second dimension of size 1."""

    keys_are_linear = False  # vLLM's linear layers may be split or quantized, so they are called as a whole

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        if "selection_pass" not in kwargs:  # whole images take the layer's own way
            return super().forward(hidden_states, **kwargs)
        hidden_states = super().forward(hidden_states.squeeze(1), **kwargs)
        return hidden_states.unsqueeze(1)

    def normed_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().normed_tokens(hidden_states.squeeze(1))

    def split_heads(self, states: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return queries, keys and values of this process: `(num_images, length, num_heads, head_dim)`."""
        stacked, _ = self.attn.qkv(states)
        parts = stacked.chunk(3, dim=-1)
        return [part.unflatten(-1, (-1, self.attn.hidden_size_per_attention_head)) for part in parts]

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        query, *_ = self.split_heads(states.unsqueeze(1))
        return query.squeeze(1)

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        _, key, _ = self.split_heads(states)
        return key.transpose(1, 2)

    def attend(self, normed: torch.Tensor, attention_mask: None, **kwargs) -> torch.Tensor:
        attn_output = self.attn(normed.unsqueeze(1), **kwargs)
        return attn_output.squeeze(1)

    def shorten_arguments(self, current: SelectionPass, kept: torch.Tensor, arguments: dict) -> dict:
        # `max_seqlen` may be larger than the longest segment.
        tables = (arguments["rotary_pos_emb_cos"], arguments["rotary_pos_emb_sin"])
        packed = {"cu_seqlens": arguments["cu_seqlens"], "position_embeddings": tables}
        packed = super().shorten_arguments(current, kept, packed)
        cos, sin = packed["position_embeddings"]
        return {
            **arguments,
            "cu_seqlens": packed["cu_seqlens"],
            "rotary_pos_emb_cos": cos,
            "rotary_pos_emb_sin": sin,
        }


class Qwen2Layer(QwenLayer):
    def split_heads(self, states: torch.Tensor) -> Sequence[torch.Tensor]:
        stacked, _ = self.attn.qkv(states)
        return self.attn.split_qkv(stacked)  # gathers the heads of all processes first


class ServedQwen2(PlacedFamily, Qwen2Vl):
    layer_classes = {"Qwen2VisionBlock": Qwen2Layer}

    @property
    def heads(self) -> tuple[int, int]:
        head_dim = self.layers[0].attn.hidden_size_per_attention_head
        return self.config.vision_config.num_heads, head_dim


class RestoringMerger(ModuleWrapper):
    """Merger after the last of `num_layers` layers that restores the kept units to their places."""

    num_layers: int

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = super().forward(hidden_states)
        restored = restore_merged(self.num_layers, self, (hidden_states,), tokens)
        return tokens if restored is None else restored


class ServedQwen25(ServedQwen2, Qwen25Vl):
    layer_classes = {"Qwen2_5_VisionBlock": QwenLayer}

    def add_hooks(self) -> list:
        # vLLM can compile this merger, and calls its `forward` past the hooks.
        self.tower.merger = RestoringMerger.of(self.tower.merger, num_layers=len(self.layers))
        return []


class ServedQwen3(ServedQwen2, Qwen3Vl):
    layer_classes = {"Qwen3_VisionBlock": QwenLayer}


class SelectingQwen(PlacedExit):
    """Qwen-VL that drops patches inside its tower, and visual tokens after it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.settings.tower.layers and self.visual.attn_backend == AttentionBackendEnum.FLASHINFER:
            raise ValueError("A schedule needs another `mm_encoder_attn_backend` than FLASHINFER.")


class SelectingQwen2(SelectingQwen):
    family_class = ServedQwen2
    steps_are_apart = False


class SelectingQwen25(SelectingQwen2):
    family_class = ServedQwen25


class SelectingQwen3(SelectingQwen):
    family_class = ServedQwen3


TripsQwen2VLForConditionalGeneration = serve(Qwen2VLForConditionalGeneration, SelectingQwen2, PlacedProcessor)
TripsQwen2_5_VLForConditionalGeneration = serve(Qwen2_5_VLForConditionalGeneration, SelectingQwen25, PlacedProcessor)
TripsQwen3VLForConditionalGeneration = serve(Qwen3VLForConditionalGeneration, SelectingQwen3, PlacedProcessor)
TripsQwen3VLMoeForConditionalGeneration = serve(Qwen3VLMoeForConditionalGeneration, SelectingQwen3, PlacedProcessor)
