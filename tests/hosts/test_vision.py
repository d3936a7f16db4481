"""Selection in the towers of CLIP, SigLIP, BridgeTower, timm and Q-Former models."""

import pytest
import torch
import transformers
from schedules import schedule_of
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from tiny_hosts import (
    HOSTS,
    LAYERS,
    PAIRS,
    PIXELS,
    RATE,
    make_bridgetower,
    make_timm,
)
from tiny_vlms import IMAGE
from torch import nn
from transformers import (
    BridgeTowerForMaskedLM,
)

from modeling_trips.hosts import apply_patch_selection, record_patch_selection, remove_patch_selection


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("guidance", ["text", ["image", "text"]])
def test_text_guidance_without_text_embeds_raises(name, guidance):
    host = HOSTS[name]
    model = host.make_model()
    host.apply(model, guidance=guidance)
    with pytest.raises(ValueError, match="text_embeds"):
        host.run(model)
    model.get_image_features(PIXELS, text_embeds=torch.zeros(3, 32))


def test_a_head_of_bridgetower_runs():
    torch.manual_seed(0)
    model = make_bridgetower(BridgeTowerForMaskedLM).eval()
    apply_patch_selection(model, schedule_of([1], RATE, "image"))
    assert model(**PAIRS).logits.shape == (3, 5, 50)


@pytest.mark.parametrize("model_class", [VisionTransformer, VisionTransformerDistilled])
def test_timm_keeps_registers_and_distillation_tokens(model_class):
    model = make_timm(model_class, **({"reg_tokens": 3} if model_class is VisionTransformer else {})).eval()
    apply_patch_selection(model, schedule_of(LAYERS, RATE, "image"))
    assert model.forward_features(PIXELS).shape[1] == model.num_prefix_tokens + 10 + 1
    with torch.no_grad():  # the prefix after a layer that changes no token is the prefix before it
        for parameter in model.blocks.parameters():
            parameter.zero_()
    model.norm = nn.Identity()
    prefix = model.forward_features(PIXELS)[:, : model.num_prefix_tokens]
    remove_patch_selection(model)
    assert torch.equal(prefix, model.forward_features(PIXELS)[:, : model.num_prefix_tokens])


@pytest.mark.parametrize("name", ["Blip2", "InstructBlip"])
@torch.no_grad()
def test_towers_of_q_former_models_select(name):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 37}
    text = {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
    config = getattr(transformers, f"{name}Config")(
        vision_config={**sizes, "image_size": 32, "patch_size": 4},
        qformer_config={**sizes, "encoder_hidden_size": 32},
        text_config={**text, "vocab_size": 99, "word_embed_proj_dim": 32},
        num_query_tokens=3,
        image_token_id=IMAGE,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    nn.init.normal_(model.query_tokens)
    for parameter in model.qformer.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    ids = torch.tensor([[IMAGE, IMAGE, IMAGE, 5, 6]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}
    if name == "InstructBlip":
        inputs["qformer_input_ids"] = torch.tensor([[5, 6]])
    expected = model(**inputs).logits
    apply_patch_selection(model.vision_model, "1:image:0.5")
    with record_patch_selection(model.vision_model) as selections:
        logits = model(**inputs).logits
    assert selections[0].kept_indices.shape == (1, 32) and logits.shape == expected.shape
    assert not torch.equal(logits, expected)
    remove_patch_selection(model.vision_model)
    assert torch.equal(model(**inputs).logits, expected)
