"""
Qwen2-VL, Qwen2.5-VL, Qwen3-VL and its mixture of experts, on vLLM's own classes.

Visual tokens have rows and columns there, so their positions depend on the selection. The places of the kept tokens
travel as more columns of their embeddings, as in vLLM's own pruning of videos (EVS), and are written before prefill.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ..hosts.layers import ModuleWrapper, SelectionPass
from ..hosts.vlm.families import Qwen2Vl, Qwen3Vl, Qwen25Vl, restore_merged
from ..hosts.vlm.tower import PackedLayer, selecting
from ..hosts.vlm.visual_tokens import VisualTokens
from .selection import RequestInputs, SelectingModel, SelectionProcessor, ServedFamily, ServedLayer


INTEGERS = {2: torch.int16, 4: torch.int32}  # by the size of the embeddings' dtype
NUM_PLACES = 3  # columns of a kept token: its row, its column, and the farthest of both that the image keeps


# ---- The tower -----------------------------------------------------------------------------------------------------


class QwenLayer(ServedLayer, PackedLayer):
    """Layer of vLLM's tower, whose sequence of patches has a second dimension of size 1."""

    keys_are_linear = False  # vLLM's linear layers may be split or quantized, so they are called as a whole

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        if "selection_pass" not in kwargs:  # whole images take the layer's own way
            return super().forward(hidden_states, **kwargs)
        return super().forward(hidden_states.squeeze(1), **kwargs).unsqueeze(1)

    def split_heads(self, states: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return queries, keys and values of this process: `(num_images, length, num_heads, head_dim)`."""
        stacked, _ = self.attn.qkv(states)
        parts = stacked.chunk(3, dim=-1)
        return [part.unflatten(-1, (-1, self.attn.hidden_size_per_attention_head)) for part in parts]

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        return self.split_heads(states.unsqueeze(1))[0].squeeze(1)

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        return self.split_heads(states)[1].transpose(1, 2)

    def attend(self, normed: torch.Tensor, attention_mask: None, **kwargs) -> torch.Tensor:
        return self.attn(normed.unsqueeze(1), **kwargs).squeeze(1)

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


class ServedQwen(ServedFamily, Qwen2Vl):
    """Parts of vLLM's model that all its Qwen classes name alike."""

    def encode(self, inputs: Mapping, current: SelectionPass | None) -> VisualTokens:
        with selecting(current):
            groups = self.model.tower_output(inputs)
        # Scorers read the columns of the language model's width. Those of deepstack follow the choice.
        width = self.config.text_config.hidden_size
        tokens = VisualTokens.whole([group[:, :width] for group in groups], output=groups)
        if current is None or not current.kept:
            return tokens
        return tokens.keep(self.kept_tokens(tokens.sizes, inputs, current))

    @property
    def heads(self) -> tuple[int, int]:
        head_dim = self.layers[0].attn.hidden_size_per_attention_head
        return self.config.vision_config.num_heads, head_dim


class ServedQwen2(ServedQwen):
    layer_classes = {"Qwen2VisionBlock": Qwen2Layer}


class RestoringMerger(ModuleWrapper):
    """Merger after the last of `num_layers` layers that restores the kept units to their places."""

    num_layers: int

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = super().forward(hidden_states)
        restored = restore_merged(self.num_layers, self, (hidden_states,), tokens)
        return tokens if restored is None else restored


class ServedQwen25(ServedQwen, Qwen25Vl):
    layer_classes = {"Qwen2_5_VisionBlock": QwenLayer}

    def add_hooks(self) -> list:
        # vLLM can compile this merger, and calls its `forward` past the hooks.
        self.tower.merger = RestoringMerger.of(self.tower.merger, num_layers=len(self.layers))
        return []


class ServedQwen3(ServedQwen, Qwen3Vl):
    layer_classes = {"Qwen3_VisionBlock": QwenLayer}


# ---- The model -----------------------------------------------------------------------------------------------------


class SelectingQwen(SelectingModel):
    """Model with positions of three numbers that drops patches inside its tower, and visual tokens after it."""

    supports_multimodal_pruning = True
    supports_encoder_tp_data = False  # its way through the tower bypasses the layers
    family_class: type[ServedQwen]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        # vLLM asks for the positions of kept tokens only with this option, which is about videos. Its classes read it
        # while they are built: for the size of the table of rotary positions, and against graphs of the encoder.
        vllm_config.model_config.multimodal_config.video_pruning_rate = 1e-6
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.select_patches(self.family_class(self), vllm_config)
        if self.settings.tower.layers:
            if self.visual.attn_backend == AttentionBackendEnum.FLASHINFER:
                raise ValueError("A schedule needs another `mm_encoder_attn_backend` than FLASHINFER.")
            self.family.add_hooks()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def tower_output(self, inputs: Mapping) -> Sequence[torch.Tensor]:
        """Return the tower's tokens of each image, with the columns of deepstack; embeddings stay as they are."""
        return self._process_image_input(self._parse_and_validate_image_input(**inputs))

    def embed_multimodal(self, **kwargs) -> Sequence[torch.Tensor]:
        grids = kwargs.get("image_grid_thw")
        if grids is None:
            return []
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            return self.with_places(VisualTokens.whole(self.tower_output(kwargs)), grids)
        request = RequestInputs.of(kwargs)
        num_patches = grids.prod(dim=-1).tolist()
        features: list[torch.Tensor] = []
        for images, patches in self.calls(pixel_values, num_patches, request):
            inputs = {"pixel_values": pixel_values[patches], "image_grid_thw": grids[images]}
            tokens = self.visual_tokens(inputs, request[images])
            whole = replace(tokens, features=tokens.output)
            features += self.with_places(whole.keep(tokens.positions), grids[images])
        return features

    # ---- Positions ----

    def with_places(self, tokens: VisualTokens, grids: torch.Tensor) -> list[torch.Tensor]:
        """Return the features of each image with its tokens' places, whose bits survive in any dtype."""
        features = []
        for group, positions, (_, _, width) in zip(tokens.features, tokens.positions, grids.tolist()):
            num_columns = width // self.family.unit
            rows = positions // num_columns
            columns = positions % num_columns
            farthest = torch.maximum(rows, columns).max().expand_as(rows)
            places = torch.stack([rows, columns, farthest], dim=1)  # (num_kept, NUM_PLACES)
            bits = places.to(INTEGERS[group.itemsize]).view(group.dtype)
            features.append(torch.cat([group, bits], dim=1))
        return features

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]):
        """Return positions where each visual token is at the start of its image, and how far they are ahead."""
        grids = MultiModalFeatureSpec.gather_kwargs(mm_features, {"image_grid_thw"}).get("image_grid_thw", [])
        parts = []
        position = end = 0
        for feature, (_, height, width) in zip(mm_features, grids):
            place = feature.mm_position
            num_before = place.offset - end
            parts.append(torch.arange(position, position + num_before))
            position += num_before
            parts.append(torch.full((place.length,), position))
            position += int(max(height, width)) // self.family.unit
            end = place.offset + place.length
        num_after = len(input_tokens) - end
        parts.append(torch.arange(position, position + num_after))
        return torch.cat(parts).repeat(3, 1), position + num_after - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor],
        mrope_positions: torch.Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor, int]:
        """Write rows and columns into the positions of the visual tokens that are about to be computed."""
        positions = mrope_positions
        if multimodal_embeddings:  # also called for every decoded token, without any
            positions = mrope_positions.clone()
            bits = torch.cat([part[:, -NUM_PLACES:] for part in multimodal_embeddings]).contiguous()
            rows, columns, farthest = bits.view(INTEGERS[bits.itemsize]).T.to(positions)
            ids = torch.as_tensor(input_ids, device=positions.device)
            visual = (ids == self.config.image_token_id).nonzero()[:, 0]
            written = visual[visual >= num_computed_tokens][: len(rows)]
            starts = positions[0, written]
            positions[1, written] = starts + rows
            positions[2, written] = starts + columns
            # Tokens of the same image that are cached have no places here, and need none. What is generated counts on
            # from the farthest place, also where the image ends the prompt.
            computed = visual[visual < num_computed_tokens]
            computed = computed[positions[0, computed] == starts[0]]
            positions[1:, computed] = starts[0] + farthest[0]
        tokens = [part[:, :-NUM_PLACES] for part in multimodal_embeddings]
        return tokens, positions, int(positions.max()) + 1 - positions.shape[1]


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    # Unlike the runners for GPUs, this one never asks the model.
    CPUModelRunner.is_multimodal_pruning_enabled = property(
        lambda runner: isinstance(getattr(runner, "model", None), SelectingQwen),
        lambda runner, value: None,
    )


# ---- The four classes ----------------------------------------------------------------------------------------------


class ImagesOnly:
    """Limits that exclude videos, which vLLM would prune, too. It needs their entry."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": 0}


class QwenProcessor(SelectionProcessor):
    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return [update for update in updates if update.modality == "image"]


class TripsQwen2Info(ImagesOnly, Qwen2VLProcessingInfo):
    pass


class TripsQwen2Processor(QwenProcessor, Qwen2VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    TripsQwen2Processor, info=TripsQwen2Info, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class TripsQwen2VLForConditionalGeneration(SelectingQwen, Qwen2VLForConditionalGeneration):
    family_class = ServedQwen2


class TripsQwen25Info(ImagesOnly, Qwen2_5_VLProcessingInfo):
    pass


class TripsQwen25Processor(QwenProcessor, Qwen2_5_VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    TripsQwen25Processor, info=TripsQwen25Info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class TripsQwen2_5_VLForConditionalGeneration(SelectingQwen, Qwen2_5_VLForConditionalGeneration):
    family_class = ServedQwen25


class TripsQwen3Info(ImagesOnly, Qwen3VLProcessingInfo):
    pass


class TripsQwen3Processor(QwenProcessor, Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    TripsQwen3Processor, info=TripsQwen3Info, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class TripsQwen3VLForConditionalGeneration(SelectingQwen, Qwen3VLForConditionalGeneration):
    family_class = ServedQwen3


class TripsQwen3MoeInfo(ImagesOnly, Qwen3VLMoeProcessingInfo):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    TripsQwen3Processor, info=TripsQwen3MoeInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class TripsQwen3VLMoeForConditionalGeneration(SelectingQwen, Qwen3VLMoeForConditionalGeneration):
    family_class = ServedQwen3
