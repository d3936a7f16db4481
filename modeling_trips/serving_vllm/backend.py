"""
Other families, on vLLM's Transformers modeling backend.

The backend builds the model of Transformers, so the families and tower layers of `modeling_trips.hosts` fit.
"""

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..hosts.layers import Projections
from ..hosts.vlm.families import find_family
from .selection import RequestInputs, SelectingModel, SelectionProcessor, ServedLayer


class FusedLayer(ServedLayer):
    """Layer whose queries, keys and values vLLM computes by one linear layer, where it can."""

    def projections(self) -> Projections:
        attention = getattr(self, "self_attn", None) or getattr(self, "attention", None)
        if not hasattr(attention, "qkv_proj"):
            return super().projections()
        width = attention.qkv_proj.output_size_per_partition // 3
        num_heads = width // attention.head_dim
        return Projections.stacked(attention.qkv_proj, width, num_heads)


class TripsVlmProcessingInfo(MultiModalProcessingInfo):
    def _get_supported_modalities(self) -> list[str]:
        return ["image"]


class TripsVlmProcessor(SelectionProcessor, MultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    TripsVlmProcessor, info=TripsVlmProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class TripsVlmForConditionalGeneration(SelectingModel, TransformersMultiModalForCausalLM):
    """A model of Transformers that drops patches inside its tower, and visual tokens after it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        family = find_family(self.model)
        layer_classes = {}
        for name, layer_class in family.layer_classes.items():
            layer_classes[name] = type(layer_class.__name__, (FusedLayer, layer_class), {})
        family.layer_classes = layer_classes
        self.select_patches(family, vllm_config)

    def _process_vision_input(
        self, modality: str, pixel_values: torch.Tensor, num_patches: torch.Tensor, **inputs
    ) -> list[torch.Tensor]:
        """Return the kept tokens of each image, which has `num_patches` rows (tiles) of `pixel_values`."""
        request = RequestInputs.of(inputs)
        inputs = {name: value.to(pixel_values.device) for name, value in inputs.items()}
        inputs["pixel_values"] = pixel_values
        counts = num_patches.flatten()
        return self.tokens_of_images(inputs, counts.tolist(), request)
