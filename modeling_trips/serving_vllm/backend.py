"""
Other families, on vLLM's Transformers modeling backend.

The backend builds the model of Transformers, so the families and tower layers of `modeling_trips.hosts` fit.
"""

from itertools import accumulate

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
from .selection import QUESTION, SelectingModel, SelectionProcessor, ServedLayer


class FusedLayer(ServedLayer):
    """Layer whose queries, keys and values vLLM computes by one linear layer, where it can."""

    def projections(self) -> Projections:
        attention = getattr(self, "self_attn", None) or getattr(self, "attention", None)
        if not hasattr(attention, "qkv_proj"):
            return super().projections()
        width = attention.qkv_proj.output_size_per_partition // 3
        return Projections.stacked(attention.qkv_proj, width, width // attention.head_dim)


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
        family.layer_classes = {
            name: type(kind.__name__, (FusedLayer, kind), {}) for name, kind in family.layer_classes.items()
        }
        self.select_patches(family, vllm_config)
        family.add_hooks()

    def _process_vision_input(
        self, modality: str, pixel_values: torch.Tensor, num_patches: torch.Tensor, **inputs
    ) -> list[torch.Tensor]:
        """Return the kept tokens of each image."""
        inputs = {name: value if name == QUESTION else value.to(pixel_values.device) for name, value in inputs.items()}
        inputs["pixel_values"] = pixel_values
        counts = num_patches.flatten().tolist()
        features: list[torch.Tensor] = []
        for images in self.split(pixel_values, counts):
            rows = slice(sum(counts[: images.start]), sum(counts[: images.stop]))
            part = {name: take(value, images, len(counts), rows, sum(counts)) for name, value in inputs.items()}
            features += self.encode_images(part, counts[images])
        return features

    def encode_images(self, inputs: dict, counts: list[int]) -> list[torch.Tensor]:
        """Return the kept tokens of each image in one call of the encoder; `counts` are rows of `pixel_values`."""
        questions = inputs.pop(QUESTION, None)
        if questions is not None:
            questions = [own for own, number in zip(questions, counts) for _ in range(number)]
        current = self.family.begin_pass(inputs)
        current.query = self.query(questions)
        groups = list(self.family.encode(inputs, current).pooler_output)
        sizes = [len(group) for group in groups]
        if current.kept:
            kept = self.family.kept_tokens(sizes, inputs, current)
            groups = [group[positions] for group, positions in zip(groups, kept)]
        if len(groups) < sum(counts):  # Idefics3: the tiles of all images are one group
            sizes = [sum(sizes) // sum(counts)] * sum(counts)
            groups = [*torch.cat(groups).unflatten(0, (sum(counts), -1))]
        groups, _ = self.select_tokens(groups, questions, sizes)
        return [torch.cat(groups[end - number : end]) for end, number in zip(accumulate(counts), counts)]


def take(value, images: slice, num_images: int, rows: slice, num_rows: int):
    """Return the part of an input that belongs to some images, of which it has an entry or a row of pixels each."""
    if len(value) in (num_images, num_rows):
        return value[images if len(value) == num_images else rows]
    return value[:, rows] if value.shape[1] == num_rows else value  # Idefics3 has one prompt before its tiles
