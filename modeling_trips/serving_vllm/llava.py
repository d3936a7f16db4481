"""LLaVA-1.5 on vLLM's own classes, with a tower of CLIP or SigLIP."""

from collections.abc import Sequence

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
from ..hosts.vlm.tower import CURRENT_PASS
from .selection import QUESTION, SelectingModel, SelectionProcessor, ServedLayer


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
        return super().forward(*args, **kwargs), None


class ServedLlava(Llava):
    """vLLM's LLaVA. The connector maps patch by patch, so kept patches stay where they are."""

    layer_classes = {"CLIPEncoderLayer": ClipLayer, "SiglipEncoderLayer": SiglipLayer}

    def __init__(self, model: LlavaForConditionalGeneration):
        self.model = self.base = model
        self.config = model.config


class TripsLlavaProcessor(SelectionProcessor, LlavaMultiModalProcessor):
    def num_kept(self, size: int) -> int:
        return self.settings.num_kept(size)  # the tower's [CLS] may be a visual token


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
        pixel_values, questions = kwargs.get("pixel_values"), kwargs.get(QUESTION)
        if pixel_values is None:
            return super().embed_multimodal(**kwargs)
        features: list[torch.Tensor] = []
        for images in self.split(pixel_values, [1] * len(pixel_values)):
            features += self.encode(pixel_values[images], None if questions is None else questions[images])
        return features

    def encode(self, pixel_values: torch.Tensor, questions: Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
        """Return the kept tokens of each image."""
        current = SelectionPass()
        current.query = self.query(questions)
        token = CURRENT_PASS.set(current)
        try:
            groups = super().embed_multimodal(pixel_values=pixel_values)
        finally:
            CURRENT_PASS.reset(token)
        return self.select_tokens(groups, questions, [self.family.tokens_per_image] * len(groups))[0]
