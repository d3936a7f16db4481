"""LLaVA-1.5 on vLLM's own classes, with a tower of CLIP or SigLIP."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..hosts.layers import SelectionPass
from ..hosts.vlm.families import Llava
from ..hosts.vlm.tower import selecting
from ..hosts.vlm.visual_tokens import VisualTokens
from .selection import RequestInputs, SelectingModel, SelectionProcessor, ServedFamily, ServedLayer
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
        with selecting(current):
            # The class's own method: the model's is the one that calls this.
            groups = LlavaForConditionalGeneration.embed_multimodal(self.model, pixel_values=inputs["pixel_values"])
        tokens = VisualTokens.whole(groups)
        if current is None or not current.kept:
            return tokens
        sizes = [self.tokens_per_image] * len(groups)
        return replace(tokens, sizes=sizes, positions=self.kept_tokens(sizes, inputs, current))


class TripsLlavaProcessor(SelectionProcessor, LlavaMultiModalProcessor):
    def num_kept(self, settings: ServingSettings, size: int) -> int:
        return settings.num_kept(size)  # the tower's [CLS] may be a visual token


@MULTIMODAL_REGISTRY.register_processor(
    TripsLlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class TripsLlavaForConditionalGeneration(SelectingModel, LlavaForConditionalGeneration):
    """LLaVA-1.5 that drops patches inside its tower, and visual tokens after it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.select_patches(ServedLlava(self), vllm_config)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def embed_multimodal(self, **kwargs) -> Sequence[torch.Tensor]:
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:  # embeddings of the caller, which stay as they are
            return super().embed_multimodal(**kwargs)
        counts = [1] * len(pixel_values)
        return self.tokens_of_images({"pixel_values": pixel_values}, counts, RequestInputs.of(kwargs))
