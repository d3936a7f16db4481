"""SmolVLM after the tower, on vLLM's own class. Its images are cut into tiles, and the number counts per tile."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.smolvlm import (
    SmolVLMDummyInputsBuilder,
    SmolVLMForConditionalGeneration,
    SmolVLMMultiModalProcessor,
    SmolVLMProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..hosts.layers import SelectionPass
from ..hosts.vlm.families import Smolvlm
from ..hosts.vlm.visual_tokens import VisualTokens
from .selection import RequestInputs, SelectingModel, SelectionProcessor, ServedFamily


class ServedSmolvlm(ServedFamily, Smolvlm):
    layer_classes = {}  # selection after the tower only

    def __init__(self, model: SmolVLMForConditionalGeneration):
        super().__init__(model)
        self.base = model.model

    def encode(self, inputs: Mapping, current: SelectionPass | None) -> VisualTokens:
        states = self.base.image_pixels_to_features(**inputs)
        tiles = self.base.connector(states)  # (num_tiles, tokens_per_image, hidden_size)
        return VisualTokens.whole(list(tiles))


class TripsSmolvlmProcessor(SelectionProcessor, SmolVLMMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    TripsSmolvlmProcessor, info=SmolVLMProcessingInfo, dummy_inputs=SmolVLMDummyInputsBuilder
)
class TripsSmolVLMForConditionalGeneration(SelectingModel, SmolVLMForConditionalGeneration):
    """SmolVLM that drops visual tokens of each tile."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.select_patches(ServedSmolvlm(self), vllm_config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.text_model.embed_tokens

    def embed_multimodal(self, **kwargs) -> Sequence[torch.Tensor]:
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:  # embeddings of the caller, which stay as they are
            return super().embed_multimodal(**kwargs)
        inputs = {"pixel_values": pixel_values, "pixel_attention_mask": kwargs["pixel_attention_mask"]}
        return self.tokens_of_images(inputs, kwargs["num_patches"].tolist(), RequestInputs.of(kwargs))
