"""Selection in the towers of CLIP, SigLIP, BridgeTower, timm and Q-Former models."""

import pytest
import torch
import transformers
from schedules import schedule_of
from tiny_hosts import PAIRS, RATE, make_bridgetower
from tiny_vlms import IMAGE
from torch import nn
from transformers import BridgeTowerForMaskedLM

from modeling_trips.hosts import apply_patch_selection, record_patch_selection, remove_patch_selection


def test_a_head_of_bridgetower_runs():
    torch.manual_seed(0)
    model = make_bridgetower(BridgeTowerForMaskedLM).eval()
    apply_patch_selection(model, schedule_of([1], RATE, "image"))
    assert model(**PAIRS).logits.shape == (3, 5, 50)


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
    assert selections[0].kept_indices.shape == (1, 32)
    assert logits.shape == expected.shape
    assert not torch.equal(logits, expected)
    remove_patch_selection(model.vision_model)
    assert torch.equal(model(**inputs).logits, expected)
