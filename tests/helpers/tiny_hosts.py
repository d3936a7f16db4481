"""Tiny versions of all patched models, with inputs and a compared output."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from schedules import schedule_of
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BridgeTowerConfig,
    BridgeTowerModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    ViltConfig,
    ViltForQuestionAnswering,
)

from modeling_trips.hosts.apply import apply_patch_selection, record_patch_selection


# 16 patches -> ceil(.7 * 16) = 12 and 1 fused -> ceil(.7 * 13) = 10 and 1 fused; the third layer doesn't select.
LAYERS, RATE = [1, 2], 0.7
KEPT = [12, 10]
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
INPUT_IDS = torch.tensor([[1, 7, 9, 4, 2], [1, 30, 2, 0, 0], [1, 8, 21, 2, 0]])
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
# Images of 32 x 32, 16 x 32 and 32 x 24 pixels, padded: 16, 8 and 12 patches.
PIXEL_MASK = torch.ones(3, 32, 32, dtype=torch.long)
PIXEL_MASK[1, 16:] = 0
PIXEL_MASK[2, :, 24:] = 0


def make_clip(model_class=CLIPModel, **text):
    return model_class(CLIPConfig(vision_config=VISION, text_config={**TEXT, **text}, projection_dim=16))


def make_siglip():
    return SiglipModel(SiglipConfig(vision_config=VISION, text_config={**TEXT, "projection_size": 32}))


def make_blip(model_class):
    text = {**TEXT, **NO_DROPOUT, "encoder_hidden_size": 32, "sep_token_id": 2}
    return model_class(BlipConfig(vision_config=VISION, text_config=text, image_text_hidden_size=16))


def make_bridgetower(model_class=BridgeTowerModel):
    # BridgeTower's heads are 64 wide. The first bridge to the cross-modal layers starts from layer 2.
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    text = {**TEXT, **NO_DROPOUT, "hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 20}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return model_class(BridgeTowerConfig(vision_config=vision, text_config=text, **sizes))


def make_vilt(model_class=ViltForQuestionAnswering, **options):
    sizes = {**VISION, "vocab_size": 50, "max_position_embeddings": 16, **NO_DROPOUT, **options}
    return model_class(ViltConfig(**sizes))


def make_timm(model_class=VisionTransformer, **options):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    return model_class(**{**sizes, **options})


class Host(NamedTuple):
    make: Callable[[], nn.Module]
    guidance: str
    inputs: dict[str, torch.Tensor]
    main_output: Callable  # of the model's output: a tensor that depends on the selection

    def make_model(self, seed=0):
        torch.manual_seed(seed)
        model = self.make().eval()
        with torch.no_grad():  # attention that differs between heads and tokens
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return model

    def apply(self, model, rate=RATE, **options):
        apply_patch_selection(model, schedule_of(LAYERS, rate, **{"guidance": self.guidance, **options}))

    def run(self, model, inputs=None):
        torch.manual_seed(0)  # ViLT shuffles its patches
        return self.main_output(model(**(self.inputs if inputs is None else inputs)))


PAIRS = {"input_ids": INPUT_IDS, "attention_mask": (INPUT_IDS != 0).long(), "pixel_values": PIXELS}
ANSWERS = {"decoder_input_ids": INPUT_IDS[:, :3], "labels": INPUT_IDS[:, :3]}
HOSTS = {
    "vilt": Host(make_vilt, "text", {**PAIRS, "pixel_mask": PIXEL_MASK}, lambda output: output.logits),
    "blip_vqa": Host(
        lambda: make_blip(BlipForQuestionAnswering), "text", {**PAIRS, **ANSWERS}, lambda output: output.loss[None]
    ),
    "blip_retrieval": Host(
        lambda: make_blip(BlipForImageTextRetrieval), "text", PAIRS, lambda output: output.itm_score
    ),
    "blip_captioning": Host(
        lambda: make_blip(BlipForConditionalGeneration), "image", PAIRS, lambda output: output.logits
    ),
    "bridgetower": Host(make_bridgetower, "image", PAIRS, lambda output: output.pooler_output),
    "clip": Host(make_clip, "image", PAIRS, lambda output: output.logits_per_image),
    "siglip": Host(make_siglip, "image", PAIRS, lambda output: output.logits_per_image),
    "timm": Host(lambda: make_timm(reg_tokens=2), "image", {"x": PIXELS}, lambda output: output),
}
each_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)


def kept_by(host, model, inputs=None):
    with torch.no_grad(), record_patch_selection(model) as selections:
        host.run(model, inputs)
    return [selection.kept_indices for selection in selections]
