"""
Other families, on vLLM's Transformers modeling backend.

The backend builds the model of Transformers, so the families and tower layers of `modeling_trips.hosts` fit. In
Qwen-VL the positions of visual tokens depend on the selection: rows and columns of the kept tokens travel as more
columns of their embeddings, as in vLLM's own pruning of videos (EVS), and are written before prefill.
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
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.platforms import current_platform

from ..hosts.layers import Projections
from ..hosts.vlm.families import find_family
from .selection import QUESTION, SelectingModel, SelectionProcessor, ServedLayer


INTEGERS = {2: torch.int16, 4: torch.int32}  # by the size of the embeddings' dtype


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

    supports_multimodal_pruning = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.model_config.uses_mrope:
            # vLLM asks for the positions of kept tokens only with this option, which is about videos.
            self.model_config.multimodal_config.video_pruning_rate = 1e-6
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
        grids = inputs.get("image_grid_thw")
        tiles = counts if grids is None else [1] * len(grids)
        if questions is not None:
            questions = [own for own, number in zip(questions, tiles) for _ in range(number)]
        tokens = self.visual_tokens(inputs, questions)
        if grids is not None:
            return [*map(self.with_places, tokens.features, tokens.positions, grids.tolist())]
        return [torch.cat(tokens.features[end - number : end]) for end, number in zip(accumulate(tiles), tiles)]

    def with_places(self, tokens: torch.Tensor, kept: torch.Tensor, grid: list[int]) -> torch.Tensor:
        """Append the row and the column of each token, whose bits survive in any dtype."""
        num_columns = grid[2] // self.family.unit
        places = torch.stack([kept // num_columns, kept % num_columns], dim=1)
        return torch.cat([tokens, places.to(INTEGERS[tokens.itemsize]).view(tokens.dtype)], dim=1)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]):
        """Return positions where each visual token is at the start of its image, and how far they are ahead."""
        grids = MultiModalFeatureSpec.gather_kwargs(mm_features, {"image_grid_thw"}).get("image_grid_thw", [])
        parts, position, end = [], 0, 0
        for feature, (_, height, width) in zip(mm_features, grids):
            place = feature.mm_position
            parts.append(torch.arange(position, position := position + place.offset - end))
            parts.append(torch.full((place.length,), position))
            position += int(max(height, width)) // self.family.unit
            end = place.offset + place.length
        parts.append(torch.arange(position, position := position + len(input_tokens) - end))
        return torch.cat(parts).repeat(3, 1), position - len(input_tokens)

    def recompute_mrope_positions(
        self, input_ids, multimodal_embeddings, mrope_positions: torch.Tensor, num_computed_tokens: int
    ):
        """Write rows and columns into the positions of the visual tokens that are about to be computed."""
        width = self.text_config.hidden_size
        positions = mrope_positions.clone()
        is_visual = torch.as_tensor(input_ids, device=positions.device) == self.family.image_token_id
        if multimodal_embeddings:
            places = torch.cat([part[:, width:] for part in multimodal_embeddings])
            places = places.contiguous().view(INTEGERS[places.itemsize]).T.to(positions)
            visual = is_visual.nonzero()[:, 0]
            visual = visual[visual >= num_computed_tokens][: places.shape[1]]
            positions[1:, visual] = positions[:1, visual] + places
        return (
            [part[:, :width] for part in multimodal_embeddings],
            positions,
            int(positions.max()) + 1 - len(is_visual),
        )


def take(value, images: slice, num_images: int, rows: slice, num_rows: int):
    """Return the part of an input that belongs to some images, of which it has an entry or a row of pixels each."""
    if len(value) in (num_images, num_rows):
        return value[images if len(value) == num_images else rows]
    return value[:, rows] if value.shape[1] == num_rows else value  # Idefics3 has one prompt before its tiles


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    # Unlike the runners for GPUs, this one never asks the model.
    CPUModelRunner.is_multimodal_pruning_enabled = property(
        lambda runner: isinstance(getattr(runner, "model", None), TripsVlmForConditionalGeneration),
        lambda runner, value: None,
    )
