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
from .selection import RequestInputs, SelectingModel, SelectionProcessor


class ServedSmolvlm(Smolvlm):
    layer_classes = {}  # selection after the tower only

    def __init__(self, model: SmolVLMForConditionalGeneration):
        self.model = model
        self.base = model.model
        self.config = model.config

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
        request = RequestInputs.of(kwargs)
        counts = kwargs["num_patches"].tolist()
        features: list[torch.Tensor] = []
        for images, tiles in self.calls(pixel_values, counts, request):
            inputs = {
                "pixel_values": pixel_values[tiles],
                "pixel_attention_mask": kwargs["pixel_attention_mask"][tiles],
            }
            features += self.tokens_of_tiles(inputs, request[images], counts[images])
        return features
