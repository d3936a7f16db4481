"""Selection in BLIP: the text that scores, and generation."""

import pytest
import torch
from tiny_hosts import HOSTS, INPUT_IDS, KEPT, PAIRS, PIXELS, kept_by

from modeling_trips.hosts import record_patch_selection, remove_patch_selection


@pytest.mark.parametrize("name", ["blip_vqa", "blip_retrieval"])
def test_blip_patches_depend_on_the_text(name):
    host = HOSTS[name]
    model = host.make_model()
    texts = INPUT_IDS.flip(0)
    other = {**host.inputs, "input_ids": texts, "attention_mask": (texts != 0).long()}
    for guidance, are_equal in (("text", [False, False]), (["image", "text"], [True, False])):
        host.apply(model, guidance=guidance)
        kept = kept_by(host, model)
        kept_for_other = kept_by(host, model, other)
        assert list(map(torch.equal, kept, kept_for_other)) == are_equal


@pytest.mark.parametrize("guidance", ["text", "image", ["image", "text"]], ids=str)
def test_blip_generate_keeps_the_patches_of_its_forward_pass(guidance):
    host = HOSTS["blip_vqa"]
    model = host.make_model()
    unpruned = model.generate(**PAIRS, max_new_tokens=8)
    host.apply(model, guidance=guidance)
    with record_patch_selection(model) as selections:
        answers = model.generate(**PAIRS, max_new_tokens=8)
    for selection, expected in zip(selections, kept_by(host, model), strict=True):
        assert torch.equal(selection.kept_indices, expected)
    inputs = {**PAIRS, "input_ids": INPUT_IDS.tolist()}
    assert torch.equal(model.generate(**inputs, max_new_tokens=8), answers)
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
    # Cross-attention over the remaining 12 tokens: another token would change the text.
    model.vision_model.post_layernorm.weight.data.zero_()
    assert not torch.equal(model.generate(PIXELS, max_new_tokens=8), captions)


def test_contrastive_image_features_of_blip_do_not_depend_on_the_text():
    host = HOSTS["blip_retrieval"]
    model = host.make_model()
    host.apply(model)
    states = model(**PAIRS, use_itm_head=False).last_hidden_state
    assert states.shape[1] == 1 + 10 + 1
    fewer_texts = model(input_ids=INPUT_IDS[:1], pixel_values=PIXELS, use_itm_head=False)
    assert torch.equal(fewer_texts.last_hidden_state, states)
    host.apply(model, guidance="image")
    assert torch.equal(model(**PAIRS).last_hidden_state, states)
