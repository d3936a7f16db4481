"""Selection in BLIP: the text that scores, and generation."""

import pytest
import torch
from tiny_hosts import HOSTS, INPUT_IDS, KEPT, PAIRS, PIXELS, kept_by

from modeling_trips.hosts import record_patch_selection, remove_patch_selection


@pytest.mark.parametrize("name", ["blip_vqa", "blip_retrieval"])
def test_blip_patches_depend_on_the_text(name):
    host = HOSTS[name]
    other_text = {**host.inputs, "input_ids": INPUT_IDS.flip(0), "attention_mask": (INPUT_IDS.flip(0) != 0).long()}
    model = host.make_model()
    for guidance, are_equal in (("text", [False, False]), ("image", [True, True]), (["image", "text"], [True, False])):
        host.apply(model, guidance=guidance)
        kept, kept_for_other = kept_by(host, model), kept_by(host, model, other_text)
        assert [torch.equal(a, b) for a, b in zip(kept, kept_for_other)] == are_equal


@pytest.mark.parametrize("guidance", ["text", "image", ["image", "text"]], ids=str)
def test_blip_generate_keeps_the_patches_of_its_forward_pass(guidance):
    host = HOSTS["blip_vqa"]
    model = host.make_model()
    unpruned = model.generate(**PAIRS, max_new_tokens=8)
    host.apply(model, guidance=guidance)
    with record_patch_selection(model) as selections:
        answers = model.generate(**PAIRS, max_new_tokens=8)
    assert all(torch.equal(a.kept_indices, b) for a, b in zip(selections, kept_by(host, model), strict=True))
    assert torch.equal(model.generate(**PAIRS, max_new_tokens=8), answers)
    listed = model.generate(**{**PAIRS, "input_ids": INPUT_IDS.tolist()}, max_new_tokens=8)
    assert torch.equal(listed, answers)
    remove_patch_selection(model)
    assert torch.equal(model.generate(**PAIRS, max_new_tokens=8), unpruned)
    assert not torch.equal(unpruned, answers)


def test_blip_generates_captions():
    host = HOSTS["blip_captioning"]
    model = host.make_model()
    host.apply(model)
    with record_patch_selection(model) as selections:
        captions = model.generate(PIXELS, max_new_tokens=8)
    assert [selection.kept_indices.shape[1] for selection in selections] == KEPT
    assert torch.equal(model.generate(PIXELS, max_new_tokens=8), captions)
    # Cross-attention over the remaining 12 tokens: another token would change the text.
    model.vision_model.post_layernorm.weight.data.zero_()
    assert not torch.equal(model.generate(PIXELS, max_new_tokens=8), captions)


def test_contrastive_image_features_of_blip_do_not_depend_on_the_text():
    host = HOSTS["blip_retrieval"]
    model = host.make_model()
    host.apply(model)
    states = model(**PAIRS, use_itm_head=False).last_hidden_state
    fewer_texts = model(input_ids=INPUT_IDS[:1], pixel_values=PIXELS, use_itm_head=False)
    assert torch.equal(fewer_texts.last_hidden_state, states) and states.shape[1] == 1 + 10 + 1
    host.apply(model, guidance="image")
    assert torch.equal(model(**PAIRS).last_hidden_state, states)
