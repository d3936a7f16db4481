"""Properties of single patched models: ViLT's padding, BLIP's text, given texts, projections, other heads."""

import pytest
import torch
from schedules import schedule_of
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from tiny_hosts import (
    HOSTS,
    INPUT_IDS,
    KEPT,
    LAYERS,
    PAIRS,
    PIXEL_MASK,
    PIXELS,
    RATE,
    kept_by,
    make_bridgetower,
    make_timm,
    make_vilt,
)
from torch import nn
from transformers import (
    BridgeTowerForMaskedLM,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltModel,
)

from modeling_trips.hosts.apply import apply_patch_selection, record_patch_selection, remove_patch_selection
from modeling_trips.hosts.layers import project_rows


# ---- ViLT's padding ------------------------------------------------------------------------------------------------


def test_vilt_does_not_depend_on_padding():
    host = HOSTS["vilt"]
    model = host.make_model()
    host.apply(model)
    together, kept_together = host.run(model), kept_by(host, model)
    for row in range(3):
        height, width = int(PIXEL_MASK[row, :, 0].sum()), int(PIXEL_MASK[row, 0].sum())
        alone = {name: tensor[row : row + 1] for name, tensor in host.inputs.items()}
        cropped = {**alone, **{name: alone[name][..., :height, :width] for name in ("pixel_values", "pixel_mask")}}
        further = {**alone, **{name: nn.functional.pad(alone[name], (0, 16, 0, 8)) for name in alone if "pix" in name}}
        for inputs, columns in ((cropped, width // 8), (alone, 4), (further, 6)):
            torch.testing.assert_close(host.run(model, inputs)[0], together[row], rtol=0, atol=1e-5)
            for indices, indices_together in zip(kept_by(host, model, inputs), kept_together):
                assert places(indices[0], columns) == places(indices_together[row], 4)


def places(indices: torch.Tensor, columns: int) -> list[tuple[int, int] | int]:
    """Return (row, column) of each kept patch, -1 for a fused token, without padding."""
    return [divmod(index, columns) if index >= 0 else index for index in indices.tolist() if index != -2]


def test_vilt_without_anything_to_drop_has_no_fused_token_in_that_row():
    """A row with a single patch keeps it, so that its fused token must not be attended to."""
    host = HOSTS["vilt"]
    model = host.make_model()
    host.apply(model)
    mask = torch.zeros_like(PIXEL_MASK)
    mask[0], mask[1, :8, :8], mask[2] = 1, 1, 1
    together = host.run(model, {**host.inputs, "pixel_mask": mask})
    alone = {name: tensor[1:2] for name, tensor in {**host.inputs, "pixel_mask": mask}.items()}
    torch.testing.assert_close(host.run(model, alone)[0], together[1], rtol=0, atol=1e-5)


def test_vilt_takes_image_embeds():
    model = make_vilt(ViltModel).eval()
    torch.manual_seed(0)
    image_embeds, _, _ = model.embeddings.visual_embed(PIXELS, torch.ones(3, 32, 32), -1)
    inputs = {"input_ids": INPUT_IDS, "image_embeds": image_embeds, "pixel_mask": torch.ones(3, 17)}
    apply_patch_selection(model, schedule_of(LAYERS, RATE))
    with record_patch_selection(model) as selections:
        actual = model(**inputs)
    expected = model(input_ids=INPUT_IDS, pixel_values=PIXELS)  # the order of the patches does not matter
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, rtol=0, atol=1e-5)
    assert [selection.kept_indices.shape[1] for selection in selections] == KEPT
    assert selections[0].candidate_indices.tolist() == [list(range(16))] * 3


@pytest.mark.parametrize("return_dict", [True, False])
def test_hidden_states_and_attentions_of_vilt_get_shorter(return_dict):
    model = make_vilt(ViltModel).eval()
    apply_patch_selection(model, schedule_of(LAYERS, RATE))
    outputs = model(**PAIRS, output_hidden_states=True, output_attentions=True, return_dict=return_dict)
    hidden_states, attentions = outputs[2:] if not return_dict else (outputs.hidden_states, outputs.attentions)
    assert [states.shape[1] for states in hidden_states] == [5 + 17, 5 + 14, 5 + 12, 5 + 12]
    assert [weights.shape[-2:] for weights in attentions] == [(22, 22), (19, 19), (17, 17)]
    plain = model(**PAIRS, return_dict=return_dict)
    assert len(plain.to_tuple() if return_dict else plain) == 2  # last hidden state and pooled output


def test_heads_of_vilt_run():
    torch.manual_seed(0)
    masked_lm = make_vilt(ViltForMaskedLM).eval()
    apply_patch_selection(masked_lm, schedule_of(LAYERS, RATE))
    assert masked_lm(**PAIRS).logits.shape == (3, 5, 50)
    two_images = make_vilt(ViltForImagesAndTextClassification, num_images=2, modality_type_vocab_size=3).eval()
    apply_patch_selection(two_images, schedule_of(LAYERS, RATE))
    with record_patch_selection(two_images) as selections:
        output = two_images(**{**PAIRS, "pixel_values": torch.stack([PIXELS, -PIXELS], dim=1)})
    assert output.logits.shape == (3, 2)
    assert [selection.kept_indices.shape[1] for selection in selections] == KEPT * 2  # both passes


# ---- BLIP's text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blip_vqa", "blip_retrieval"])
def test_blip_patches_depend_on_the_text(name):
    host = HOSTS[name]
    other_text = {**host.inputs, "input_ids": INPUT_IDS.flip(0), "attention_mask": (INPUT_IDS.flip(0) != 0).long()}
    model = host.make_model()
    for guidance, are_equal in (("text", [False, False]), ("image", [True, True]), (["image", "text"], [True, False])):
        host.apply(model, guidance=guidance)
        kept, kept_for_other = kept_by(host, model), kept_by(host, model, other_text)
        assert [torch.equal(a, b) for a, b in zip(kept, kept_for_other)] == are_equal


def test_blip_takes_its_arguments_by_position():
    host = HOSTS["blip_vqa"]
    model = host.make_model()
    host.apply(model)
    inputs = host.inputs
    names = ("input_ids", "pixel_values", "decoder_input_ids")
    mask = inputs["attention_mask"]
    output = model(*(inputs[name] for name in names), None, mask, labels=inputs["labels"])
    assert torch.equal(output.loss[None], host.run(model))


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


# ---- Given texts, projections, other heads -------------------------------------------------------------------------


def test_text_embeds_get_a_gradient_through_the_fused_token():
    model = HOSTS["clip"].make_model()
    text_embeds = torch.randn(3, 32, requires_grad=True)
    for fuses in (True, False):
        apply_patch_selection(model, schedule_of(LAYERS, RATE, "text", fuses))
        features = model.get_image_features(PIXELS, text_embeds=text_embeds).pooler_output
        (gradient,) = torch.autograd.grad(features.square().sum(), text_embeds, allow_unused=True)
        assert (gradient is not None and bool((gradient.abs().amax(dim=1) > 0).all())) == fuses


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


def test_a_part_matches_the_whole_projection():
    class Adapted(nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states) + 1

    states = torch.randn(4, 6)
    for linear in (nn.Linear(6, 9), nn.Linear(6, 9, bias=False), Adapted(6, 9)):
        torch.testing.assert_close(project_rows(linear, slice(3, 6), states), linear(states)[:, 3:6])


def test_recorded_numbers_are_those_of_the_original_grid():
    """2 of 16 patches stay, then 1 of these and the fused token."""
    model = HOSTS["timm"].make_model()
    apply_patch_selection(model, schedule_of(LAYERS, 0.1, "image"))
    with record_patch_selection(model) as selections:
        model(PIXELS)
        model(PIXELS)
    first, second, *again = selections
    for selection, other in zip((first, second), again, strict=True):
        assert torch.equal(selection.candidate_indices, other.candidate_indices)
    for row in range(3):
        best = first.scores[row].topk(2).indices.sort().values
        assert first.kept_indices[row].tolist() == best.tolist()
        assert second.candidate_indices[row].tolist() == [*best.tolist(), -1]
        assert second.kept_indices[row, 0] == second.candidate_indices[row][second.scores[row].argmax()]


def test_blip_encodes_the_text_only_for_text_guidance():
    model = HOSTS["blip_vqa"].make_model()
    for guidance, rate in (("image", RATE), (["image", "text"], [RATE, 1.0])):
        HOSTS["blip_vqa"].apply(model, rate=rate, guidance=guidance)
        assert not model._forward_pre_hooks and "generate" not in vars(model)


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
