"""
InternVL in its published form (`InternVLChatModel`) after the tower, on vLLM's own class. Its images are cut into
tiles, and the number counts per tile. Transformers has this model in another form, which vLLM's backend serves.
"""

from collections.abc import Mapping, Sequence

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.internvl import (
    InternVLChatModel,
    InternVLDummyInputsBuilder,
    InternVLMultiModalProcessor,
    InternVLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..hosts.layers import SelectionPass
from ..hosts.vlm.families import Internvl
from ..hosts.vlm.visual_tokens import VisualTokens
from .selection import RequestInputs, SelectingModel, SelectionProcessor, ServedFamily


class ServedInternvl(ServedFamily, Internvl):
    layer_classes = {}  # selection after the tower only

    @property
    def tokens_per_image(self) -> int:
        return self.model.num_image_token

    def encode(self, inputs: Mapping, current: SelectionPass | None) -> VisualTokens:
        tiles = self.model.extract_feature(inputs["pixel_values"])  # (num_tiles, tokens_per_image, hidden_size)
        return VisualTokens.whole(list(tiles))


class TripsInternvlInfo(InternVLProcessingInfo):
    ctx_video_token = None  # no videos


class TripsInternvlProcessor(SelectionProcessor, InternVLMultiModalProcessor):
    pixels = "pixel_values_flat"

    @property
    def image_token_id(self) -> int:  # the configuration does not have it
        return self.info.get_hf_processor().ctx_image_token_id


@MULTIMODAL_REGISTRY.register_processor(
    TripsInternvlProcessor, info=TripsInternvlInfo, dummy_inputs=InternVLDummyInputsBuilder
)
class TripsInternVLChatModel(SelectingModel, InternVLChatModel):
    """InternVL that drops visual tokens of each tile."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.select_patches(ServedInternvl(self), vllm_config)

    def embed_multimodal(self, **kwargs) -> Sequence[torch.Tensor]:
        pixel_values = kwargs.get("pixel_values_flat")
        if pixel_values is None:  # embeddings of the caller, which stay as they are
            return super().embed_multimodal(**kwargs)
        counts = kwargs["image_num_patches"].tolist()
        return self.tokens_of_images({"pixel_values": pixel_values}, counts, RequestInputs.of(kwargs))
