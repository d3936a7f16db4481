"""Selection in ViLT: padding, given embeddings, heads."""

import pytest
import torch
from schedules import schedule_of
from tiny_hosts import HOSTS, INPUT_IDS, KEPT, LAYERS, PAIRS, PIXEL_MASK, PIXELS, RATE, kept_by, make_vilt
from torch import nn
from torch.testing import assert_close
from transformers import ViltForImagesAndTextClassification, ViltForMaskedLM, ViltModel

from modeling_trips.hosts import apply_patch_selection, record_patch_selection


def test_vilt_does_not_depend_on_padding():
    host = HOSTS["vilt"]
    model = host.make_model()
    host.apply(model)
    together = host.run(model)
    kept_together = kept_by(host, model)
    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in host.inputs.items()}
        height = int(PIXEL_MASK[row, :, 0].sum())
        width = int(PIXEL_MASK[row, 0].sum())
        cropped = {**alone}
        padded = {**alone}
        for name in ("pixel_values", "pixel_mask"):
            cropped[name] = alone[name][..., :height, :width]
            padded[name] = nn.functional.pad(alone[name], (0, 16, 0, 8))
        for inputs, columns in ((cropped, width // 8), (alone, 4), (padded, 6)):
            assert_close(host.run(model, inputs)[0], together[row], rtol=0, atol=1e-5)
            for indices, indices_together in zip(kept_by(host, model, inputs), kept_together):
                assert places(indices[0], columns) == places(indices_together[row], 4)


def places(indices, columns):
    """Return (row, column) of each kept patch, -1 for a fused token, without padding."""
    return [divmod(index, columns) if index >= 0 else index for index in indices.tolist() if index != -2]


def test_vilt_without_anything_to_drop_has_no_fused_token_in_that_row():
    """A row with a single patch keeps it, so that its fused token must not be attended to."""
    host = HOSTS["vilt"]
    model = host.make_model()
    host.apply(model)
    mask = torch.ones_like(PIXEL_MASK)
    mask[1, 8:] = 0
    mask[1, :, 8:] = 0
    inputs = {**host.inputs, "pixel_mask": mask}
    together = host.run(model, inputs)
    alone = {name: tensor[1:2] for name, tensor in inputs.items()}
    assert_close(host.run(model, alone)[0], together[1], rtol=0, atol=1e-5)


def test_vilt_takes_image_embeds():
    model = make_vilt(ViltModel).eval()
    torch.manual_seed(0)
    image_embeds, _, _ = model.embeddings.visual_embed(PIXELS, torch.ones(3, 32, 32), -1)
    inputs = {"input_ids": INPUT_IDS, "image_embeds": image_embeds, "pixel_mask": torch.ones(3, 17)}
    apply_patch_selection(model, schedule_of(LAYERS, RATE))
    with record_patch_selection(model) as selections:
        actual = model(**inputs)
    expected = model(input_ids=INPUT_IDS, pixel_values=PIXELS)  # the order of the patches does not matter
    assert_close(actual.pooler_output, expected.pooler_output, rtol=0, atol=1e-5)
    assert [selection.kept_indices.shape[1] for selection in selections] == KEPT
    assert selections[0].candidate_indices.tolist() == [list(range(16))] * 3


@pytest.mark.parametrize("return_dict", [True, False])
def test_hidden_states_and_attentions_of_vilt_get_shorter(return_dict):
    model = make_vilt(ViltModel).eval()
    apply_patch_selection(model, schedule_of(LAYERS, RATE))
    outputs = model(**PAIRS, output_hidden_states=True, output_attentions=True, return_dict=return_dict)
    hidden_states, attentions = outputs[2:]
    assert [states.shape[1] for states in hidden_states] == [5 + 17, 5 + 14, 5 + 12, 5 + 12]
    assert [weights.shape[-2:] for weights in attentions] == [(22, 22), (19, 19), (17, 17)]
    plain = model(**PAIRS, return_dict=return_dict)
    assert len(plain) == 2  # last hidden state and pooled output


def test_heads_of_vilt_run():
    torch.manual_seed(0)
    masked_lm = make_vilt(ViltForMaskedLM).eval()
    apply_patch_selection(masked_lm, schedule_of(LAYERS, RATE))
    assert masked_lm(**PAIRS).logits.shape == (3, 5, 50)
    two_images = make_vilt(ViltForImagesAndTextClassification, num_images=2, modality_type_vocab_size=3).eval()
    apply_patch_selection(two_images, schedule_of(LAYERS, RATE))
    inputs = {**PAIRS, "pixel_values": torch.stack([PIXELS, -PIXELS], dim=1)}
    with record_patch_selection(two_images) as selections:
        output = two_images(**inputs)
    assert output.logits.shape == (3, 2)
    assert [selection.kept_indices.shape[1] for selection in selections] == KEPT * 2  # both passes
