"""
Selection after the tower of models of vLLM whose towers the project does not know: vLLM's own class encodes images.
"""

from collections.abc import Mapping
from functools import cache

import torch
from vllm import ModelRegistry
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem
from vllm.multimodal.processing import PromptUpdateDetails

from ..hosts.vlm.visual_tokens import VisualTokens
from .positions import PlacedExit, PlacedProcessor
from .selection import SelectingExit, SelectionProcessor, ServedFamily, serve
from .settings import ServingSettings


WHOLE_IDS = "whole_ids"  # an input of the model for each image


class InternvlFamily(ServedFamily):
    @property
    def tokens_per_image(self) -> int:
        return self.model.num_image_token


class InternvlExit(SelectingExit):
    """InternVL in its published form, which Transformers does not have. The number counts per tile."""

    family_class = InternvlFamily


class InternvlProcessor(SelectionProcessor):
    pixels = {"image": "pixel_values_flat"}


class SmolvlmFamily(ServedFamily):
    @property
    def tokens_per_image(self) -> int:
        return self.model.model.image_seq_len


class SmolvlmExit(SelectingExit):
    family_class = SmolvlmFamily


class InterleavedProcessor(SelectionProcessor):
    """
    Processor of a model with other tokens between the visual tokens of an image. The question which of them are kept
    decides the order, so the model embeds both, and gets the tokens of the whole image.
    """

    def _get_mm_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        updates = super()._get_mm_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        images = out_mm_kwargs.get("image", [])
        for item, (update,) in zip(images, updates.get("image", [])):
            ids = torch.tensor(update.content.whole_ids)
            field = MultiModalBatchedField()
            item[WHOLE_IDS] = MultiModalFieldElem(data=ids, field=field)
        return updates

    def shorten(self, settings: ServingSettings, sizes: list[int], whole: PromptUpdateDetails) -> PromptUpdateDetails:
        kept = super().shorten(settings, sizes, whole)
        kept.whole_ids = whole.full
        kept.is_embed = None  # all
        return kept


class InterleavedExit(SelectingExit):
    def join(self, tokens: VisualTokens, inputs: Mapping) -> list[torch.Tensor]:
        features = []
        for ids, group, kept in zip(inputs[WHOLE_IDS], tokens.features, tokens.positions):
            is_visual = ids == self.config.image_token_id
            (visual,) = is_visual.nonzero(as_tuple=True)
            (others,) = (~is_visual).nonzero(as_tuple=True)
            places = torch.cat([visual[kept], others])
            other_embeddings = self.embed_input_ids(ids[others])
            embeddings = torch.cat([group, other_embeddings.to(group.dtype)])
            order = places.argsort()
            features.append(embeddings[order])
        return features


class MiniCpmProcessor(SelectionProcessor):
    def tile_sizes(self, item: MultiModalKwargsItem, num_visual: int) -> list[int]:
        patches = item["tgt_sizes"].data.prod(dim=-1)  # of each slice
        sizes = patches * num_visual // patches.sum()
        return sizes.tolist()


# By architecture of vLLM: how it selects, and its processor.
PARTS = {
    "Glm4vForConditionalGeneration": (PlacedExit, PlacedProcessor),
    "Glm4vMoeForConditionalGeneration": (PlacedExit, PlacedProcessor),
    "InternVLChatModel": (InternvlExit, InternvlProcessor),
    "MiniCPMV4_6ForConditionalGeneration": (SelectingExit, MiniCpmProcessor),
    "Mistral3ForConditionalGeneration": (InterleavedExit, InterleavedProcessor),
    "SmolVLMForConditionalGeneration": (SmolvlmExit, SelectionProcessor),
}


@cache
def __getattr__(name: str) -> type:
    """Return the class of an architecture with the prefix Trips, so that only its module of vLLM is imported."""
    architecture = name.removeprefix("Trips")
    if architecture == name:
        raise AttributeError(f"The module {__name__} has no {name}.")
    own_class = ModelRegistry.models[architecture].load_model_cls()
    return serve(own_class, *PARTS.get(architecture, (SelectingExit,)))
