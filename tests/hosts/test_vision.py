"""Selection in the towers of CLIP, SigLIP, BridgeTower, timm and Q-Former models."""

import pytest
import torch
from schedules import schedule_of
from tiny_classes import IMAGE, make, square
from tiny_hosts import PAIRS, RATE, make_bridgetower
from transformers import BridgeTowerForMaskedLM

from modeling_trips.hosts import apply_patch_selection, record_patch_selection, remove_patch_selection


def test_a_head_of_bridgetower_runs():
    torch.manual_seed(0)
    model = make_bridgetower(BridgeTowerForMaskedLM).eval()
    apply_patch_selection(model, schedule_of([1], RATE, "image"))
    assert model(**PAIRS).logits.shape == (3, 5, 50)


@pytest.mark.parametrize("name", ["blip-2", "instructblip"])
@torch.no_grad()
def test_towers_of_q_former_models_select(name):
    text = {"model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 32}
    model = make(name, {"num_query_tokens": 3, "image_token_id": IMAGE, "text_config": text})
    inputs = {"input_ids": torch.tensor([[IMAGE, IMAGE, IMAGE, 5, 6]]), **square(0)}
    if name == "instructblip":
        inputs["qformer_input_ids"] = torch.tensor([[5, 6]])
    expected = model(**inputs).logits
    apply_patch_selection(model.vision_model, "1:image:0.5")
    with record_patch_selection(model.vision_model) as selections:
        logits = model(**inputs).logits
    assert selections[0].kept_indices.shape == (1, 8)
    assert logits.shape == expected.shape
    assert not torch.equal(logits, expected)
    remove_patch_selection(model.vision_model)
    assert torch.equal(model(**inputs).logits, expected)
