"""
Parts of a model that become graphs, with the inputs for tracing.

    text             ids, types, mask           -> states of the text
    images           pixels                     -> image_cache: image states that depend on no text
    fusion           states, mask, image_cache  -> fused states, kept patches
    image_features   image_cache                -> image states without a text, for retrieval
    cross_attention  fused states               -> keys and values of the decoder's cross-attention
    decoder          tokens, keys and values    -> logits, keys and values of these tokens

The numbers of texts and images and the lengths of texts and answers are dynamic. The image size and the schedule are
fixed, so all numbers of image tokens are constants.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves, tree_map, tree_structure, tree_unflatten
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from modeling_trips import (
    TripsForConditionalGeneration,
    TripsForPreTraining,
    TripsForRetrieval,
    TripsImageCache,
    TripsModel,
    TripsModelOutput,
    TripsPreTrainedModel,
    TripsVisionConfig,
    TripsVisionModelOutput,
)

from ..modeling_trips_vision import select_rows


# Sizes for tracing. All differ, because tracing fixes equal sizes as equal.
NUM_IMAGES = 3
NUM_TEXTS = 4
TEXT_LENGTH = 5
ANSWER_LENGTH = 6
CACHE_LENGTH = 2

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]  # one pair for each layer


class Graph(NamedTuple):
    """Part of a model with its arguments for tracing and their dynamic dimensions."""

    module: nn.Module
    inputs: dict[str, Any]
    dynamic_shapes: dict[str, Any]


def fields_of(image_cache: TripsImageCache) -> dict[str, Any]:
    """Return the fields of an image cache that differ from image to image."""
    return {**image_cache.tensors, "selection": image_cache.selection}


def tensors_of(image_cache: TripsImageCache) -> list[torch.Tensor]:
    """Return the tensors of an image cache in the order of the graphs' inputs."""
    return tree_leaves(fields_of(image_cache))


class ImagesPart(nn.Module):
    def __init__(self, model: TripsModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> dict[str, Any]:
        return fields_of(self.model.encode_images(pixel_values))


class PartBehindCache(nn.Module):
    """Part that takes the tensors of an image cache. `image_cache` has the other fields."""

    def __init__(self, model: TripsModel, image_cache: TripsImageCache):
        super().__init__()
        self.model = model
        self.image_cache = image_cache
        self.structure = tree_structure(fields_of(image_cache))

    def whole(self, tensors: list[torch.Tensor]) -> TripsImageCache:
        return replace(self.image_cache, **tree_unflatten(tensors, self.structure))


class FusionPart(PartBehindCache):
    def forward(
        self,
        text_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_index: torch.LongTensor,
        image_cache: list[torch.Tensor],
    ) -> TripsModelOutput:
        fused = self.model.fuse(
            text_states, attention_mask, image_index=image_index, image_cache=self.whole(image_cache)
        )
        vision = fused.vision_model_output
        return TripsModelOutput(
            last_hidden_state=fused.last_hidden_state,
            selection=fused.selection,
            vision_model_output=TripsVisionModelOutput(
                last_hidden_state=select_rows(vision.last_hidden_state, vision.image_index)
            ),
        )


class ImageFeaturesPart(PartBehindCache):
    def forward(self, image_cache: list[torch.Tensor]) -> TripsVisionModelOutput:
        return self.model.vision_model(image_cache=self.whole(image_cache))


class CrossAttentionPart(nn.Module):
    def __init__(self, model: TripsForConditionalGeneration):
        super().__init__()
        self.layers = nn.ModuleList(layer.crossattention.self for layer in model.decoder.encoder.layer)

    def forward(self, encoder_hidden_states: torch.Tensor) -> KeyValues:
        return [layer.key_value(encoder_hidden_states, None) for layer in self.layers]


class DecoderPart(nn.Module):
    def __init__(self, model: TripsForConditionalGeneration):
        super().__init__()
        self.decoder = model.decoder
        self.lm_head = model.lm_head

    def forward(
        self,
        input_ids: torch.LongTensor,
        encoder_attention_mask: torch.Tensor,
        own: KeyValues,
        cross: KeyValues,
    ) -> dict[str, Any]:
        cache = EncoderDecoderCache(DynamicCache(own), DynamicCache(cross))
        decoded = self.decoder(
            input_ids,
            encoder_hidden_states=cross[0][0].transpose(1, 2).flatten(2),  # only its shape is used
            encoder_attention_mask=encoder_attention_mask,
            cache=cache,
        )
        start = own[0][0].shape[2]
        new = [(layer.keys[:, :, start:], layer.values[:, :, start:]) for layer in cache.self_attention_cache.layers]
        return {"logits": self.lm_head(decoded.last_hidden_state), "own": new}


def graphs_of(model: TripsPreTrainedModel) -> dict[str, Graph]:
    """Return the graphs of a model by name."""
    trunk = model if isinstance(model, TripsModel) else getattr(model, "model", None)
    if not isinstance(trunk, TripsModel) or isinstance(model, TripsForPreTraining):  # its outputs are losses
        raise ValueError(
            f"Export is not supported for {type(model).__name__}. Load the checkpoint as a TripsModel or as a model "
            "for a task."
        )
    with torch.device("meta"):  # on meta, numbers of tokens that depend on scores have their maximum
        meta_model = TripsModel(trunk.config).eval()
        samples = sample_outputs(meta_model)
    texts = Dim("num_texts", max=2**16)
    images = Dim("num_images", max=2**16)
    text_length = Dim("text_length", max=trunk.config.text_config.max_position_embeddings)
    by_text = {0: texts}
    by_token = {0: texts, 1: text_length}
    mask = torch.ones(NUM_TEXTS, TEXT_LENGTH, dtype=torch.long)
    image_cache = samples["image_cache"]
    of_cache = {"image_cache": [{0: images} for _ in tensors_of(image_cache)]}

    graphs = {
        "text": Graph(
            trunk.text_model,
            # Separate tensors, because tracing merges identical ones.
            {"input_ids": torch.ones_like(mask), "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)},
            {"input_ids": by_token, "attention_mask": by_token, "token_type_ids": by_token},
        ),
        "images": Graph(ImagesPart(trunk), {"pixel_values": samples["pixel_values"]}, {"pixel_values": {0: images}}),
        "fusion": Graph(
            FusionPart(trunk, image_cache),
            {
                "text_states": samples["text_states"],
                "attention_mask": mask,
                "image_index": torch.arange(NUM_TEXTS) % NUM_IMAGES,
                "image_cache": tensors_of(image_cache),
            },
            {"text_states": by_token, "attention_mask": by_token, "image_index": by_text, **of_cache},
        ),
    }
    if isinstance(model, TripsForRetrieval):
        graphs["image_features"] = Graph(
            ImageFeaturesPart(trunk, image_cache), {"image_cache": tensors_of(image_cache)}, of_cache
        )
    if isinstance(model, TripsForConditionalGeneration):
        graphs |= graphs_of_decoder(model, samples["fused_states"], texts, text_length)
    return graphs


def image_shape(config: TripsVisionConfig) -> tuple[int, ...]:
    """Return height and width in pixels."""
    return tuple(patches * side for patches, side in zip(config.grid_size, config.patch_shape))


def sample_outputs(model: TripsModel) -> dict[str, torch.Tensor | TripsImageCache]:
    """Return zeros on the CPU with the shapes of the values between the parts of a model."""
    config = model.config.vision_config
    pixel_values = torch.zeros(NUM_IMAGES, config.num_channels, *image_shape(config))
    text_states = torch.zeros(NUM_TEXTS, TEXT_LENGTH, model.config.text_config.hidden_size)
    samples = {
        "pixel_values": pixel_values,
        "text_states": text_states,
        "fused_states": torch.zeros(NUM_TEXTS, TEXT_LENGTH, model.config.fusion_encoder_config.hidden_size),
    }
    samples = tree_map(zeros_on_cpu, samples)
    return {**samples, "image_cache": model.encode_images(pixel_values).map(zeros_on_cpu)}


def zeros_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor, device="cpu")


def graphs_of_decoder(
    model: TripsForConditionalGeneration, fused_states: torch.Tensor, texts: Dim, text_length: Dim
) -> dict[str, Graph]:
    config = model.config.decoder_config
    answer_length, cache_length = (
        Dim(name, min=least, max=config.max_position_embeddings) for name, least in (("answer", 1), ("cache", 0))
    )
    num_heads = config.num_attention_heads

    def key_values(length: int) -> KeyValues:
        shape = (NUM_TEXTS, num_heads, length, config.hidden_size // num_heads)
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]

    return {
        "cross_attention": Graph(
            CrossAttentionPart(model),
            {"encoder_hidden_states": fused_states},
            {"encoder_hidden_states": {0: texts, 1: text_length}},
        ),
        "decoder": Graph(
            DecoderPart(model),
            {
                "input_ids": torch.ones(NUM_TEXTS, ANSWER_LENGTH, dtype=torch.long),
                "encoder_attention_mask": torch.ones(NUM_TEXTS, TEXT_LENGTH, dtype=torch.long),
                "own": key_values(CACHE_LENGTH),
                "cross": key_values(TEXT_LENGTH),
            },
            {
                "input_ids": {0: texts, 1: answer_length},
                "encoder_attention_mask": {0: texts, 1: text_length},
                "own": [({0: texts, 2: cache_length},) * 2 for _ in range(config.num_hidden_layers)],
                "cross": [({0: texts, 2: text_length},) * 2 for _ in range(config.num_hidden_layers)],
            },
        ),
    }
