"""Faulty inputs and options of patched vision-language models."""

import pytest
import torch
from tiny_vlms import BY_NAME, IMAGE, VLMS, make_inputs

from modeling_trips.hosts import TextGuide, apply_patch_selection, prune_inputs, record_patch_selection


families = pytest.mark.parametrize("vlm", VLMS, ids=lambda vlm: vlm.name)


@families
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@torch.no_grad()
def test_a_faulty_image_changes_no_other_row(vlm, value):
    model, inputs = vlm.make(), make_inputs(vlm, [1, 1])
    apply_patch_selection(model, "1:text:0.5,2:image:0.5", visual_tokens=5, guide=TextGuide.for_model(model))
    with record_patch_selection(model) as recorded:
        expected = model(**inputs).logits
    kept = [selection.kept_indices.shape for selection in recorded]
    first_half = inputs["image_grid_thw"][0].prod() if vlm.kind == "packed" else 1
    inputs["pixel_values"][:first_half] = value
    with record_patch_selection(model) as recorded:
        logits = model(**inputs).logits
    assert [selection.kept_indices.shape for selection in recorded] == kept
    assert logits[0].isnan().any()
    tolerance = 1e-5 if vlm.name == "qwen3_vl_moe" else 0.0  # experts gather the tokens of all rows
    torch.testing.assert_close(logits[1], expected[1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("scorer", ["prompt", "diversity", "random"])
@torch.no_grad()
def test_scorers_keep_the_given_number_of_faulty_tokens(scorer):
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm, [1, 1])
    inputs["pixel_values"][0] = torch.nan
    pruned = prune_inputs(model, inputs, visual_tokens=7, scorer=scorer)
    assert (pruned["input_ids"] == IMAGE).sum(dim=1).tolist() == [7, 7]


@pytest.mark.parametrize("name", ["llava", "smolvlm", "qwen2_vl"])
@torch.no_grad()
def test_a_faulty_guide_keeps_the_given_number(name):
    vlm = BY_NAME[name]
    model, inputs = vlm.make(), make_inputs(vlm, [1, 1])
    guide = TextGuide.for_model(model)
    apply_patch_selection(model, "1:text:0.3", guide=guide)
    shape = model(**inputs).logits.shape
    for value in (torch.nan, torch.inf, 1e38):
        guide.query.weight.fill_(value)
        assert model(**inputs).logits.shape == shape


@pytest.mark.parametrize("name", ["llava", "llava_next", "smolvlm", "qwen2_vl"])
@pytest.mark.parametrize("schedule", ["1:image:0.5", "1:text:0.5", "unpruned"])
@torch.no_grad()
def test_placeholders_that_do_not_match_raise(name, schedule):
    vlm = BY_NAME[name]
    model, inputs = vlm.make(), make_inputs(vlm, [1, 1])
    guide = TextGuide.for_model(model) if "text" in schedule else None
    apply_patch_selection(model, schedule, visual_tokens=5, guide=guide)
    ids, is_image = inputs["input_ids"], inputs["input_ids"] == IMAGE
    fewer, none, moved = ids.clone(), ids.clone(), ids.clone()
    fewer[0, is_image[0].nonzero()[0]] = 7
    none[0, is_image[0]] = 7
    moved[0, is_image[0].nonzero()[0]], moved[1, -1] = 7, IMAGE
    for faulty in (fewer, none, moved):
        with pytest.raises(ValueError, match="input_ids"):
            model(**{**inputs, "input_ids": faulty})
    for name in ("pixel_values", "input_ids"):
        with pytest.raises(ValueError, match=name):
            model(**{**inputs, name: inputs[name][:0]})


@torch.no_grad()
def test_the_text_after_the_last_image_scores():
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm, [2])
    ids, embed = inputs["input_ids"], model.get_input_embeddings()
    prompts = []

    def keep_first(features, prompt, prompt_mask, num_kept):
        prompts.append(prompt[prompt_mask])
        return torch.arange(num_kept).expand(len(features), -1), features[:, :num_kept]

    length = int((ids[0] == IMAGE).nonzero()[-1]) + 1
    prune_inputs(model, inputs, 5, scorer=keep_first)
    # Without text after the last image, all text.
    pixels = inputs["pixel_values"]
    prune_inputs(model, {"input_ids": ids[:, :length], "pixel_values": pixels}, 5, scorer=keep_first)
    after, everything = ids[0, length:], ids[0, :length]
    assert torch.equal(prompts[0], embed(after).repeat(2, 1))  # once per image
    assert torch.equal(prompts[1], embed(everything[everything != IMAGE]).repeat(2, 1))


def test_a_length_that_the_prompt_exceeds_is_named():
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    apply_patch_selection(model, visual_tokens=5)
    with pytest.raises(ValueError, match="max_length.*got 3"):
        model.generate(**inputs, max_length=3)
    assert model.generate(**inputs, max_length=3, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


@torch.no_grad()
def test_selection_at_the_exit_needs_no_schedule():
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    expected = model(**prune_inputs(model, inputs, visual_tokens=8)).logits
    apply_patch_selection(model, visual_tokens=8)
    assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(ValueError, match="schedule"):
        apply_patch_selection(model)


@pytest.mark.parametrize(("name", "most"), [("llava", 64), ("paligemma", 64), ("gemma3", 16), ("internvl", 16)])
def test_more_visual_tokens_than_an_image_has_raise(name, most):
    vlm = BY_NAME[name]
    model = vlm.make()
    apply_patch_selection(model, visual_tokens=most)
    with pytest.raises(ValueError, match="visual_tokens"):
        apply_patch_selection(model, visual_tokens=most + 1)
    with pytest.raises(ValueError, match="visual_tokens"):
        prune_inputs(model, make_inputs(vlm), visual_tokens=most + 1)
