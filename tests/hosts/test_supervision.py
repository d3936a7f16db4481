"""Supervision of a text guide for each family: attention of its layer, and targets."""

import PIL.Image
import pytest
import torch
from tiny_vlms import BY_NAME, VLMS, Vlm, make_inputs

from modeling_trips.hosts import TextGuide, apply_patch_selection, prune_inputs
from modeling_trips.hosts.vlm.families import find_family
from modeling_trips.hosts.vlm.supervision import (
    guided_selection,
    region_masks,
    rows_of_images,
    targets_of_attention,
    targets_of_masks,
)
from modeling_trips.patch_selection import selection_loss


families = pytest.mark.parametrize("vlm", VLMS, ids=lambda vlm: vlm.name)
PACKED_ANEW = ("llava_next", "llava_onevision")


def guided(vlm: Vlm):
    model = vlm.make().requires_grad_(False)
    guide = TextGuide.for_model(model)
    apply_patch_selection(model, "1:text:0.5", guide=guide)
    return model, guide


def inputs_of_masks(vlm: Vlm) -> tuple[dict, dict]:
    """
    Return inputs with values from -1 (black) to 1 (white), and black inputs. In each image or tile the first unit is
    white, and a half of the second is gray, as where resizing has mixed the edge of a region.
    """
    blanks = make_inputs(vlm)
    blanks["pixel_values"] = torch.full_like(blanks["pixel_values"], -1)
    pixels, unit = blanks["pixel_values"].clone(), find_family(vlm.make()).unit
    if vlm.kind == "packed":
        number = unit**2
        for first in (0, blanks["image_grid_thw"][0].prod()):
            pixels[first : first + number] = 1
            pixels[first + number : first + 2 * number, ::2] = 0
    else:
        side = 4 * unit
        pixels[..., :side, :side] = 1
        pixels[..., :side:2, side : 2 * side] = 0
    return {**blanks, "pixel_values": pixels}, blanks


@families
def test_scores_have_gradients_and_the_shape_of_targets(vlm):
    model, guide = guided(vlm)
    inputs = make_inputs(vlm)
    selection = guided_selection(model, inputs)
    targets = targets_of_masks(model, *inputs_of_masks(vlm))
    rows = rows_of_images(model, inputs)
    assert len(rows) == len(targets) and {*rows} == {0, 1} and rows == sorted(rows)
    assert targets.shape == selection.scores.shape
    torch.testing.assert_close(targets[:, :2], torch.tensor([[0.8, 0.2]]).expand(len(targets), -1))
    assert not targets[:, 2:].any()
    selection_loss(selection.scores, selection.candidate_indices, targets).mean().backward()
    assert guide.query.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@families
def test_attention_is_that_of_the_eager_map(vlm):
    """The rows that predict the answer equal those of the eager attention map."""
    model, inputs = vlm.make(), make_inputs(vlm)
    if vlm.name in PACKED_ANEW:
        with pytest.raises(ValueError):
            targets_of_attention(model, inputs, [2, 3])
        return
    family = find_family(model)
    own = model.get_decoder().config._attn_implementation
    targets = targets_of_attention(model, inputs, [2, 3])
    assert model.get_decoder().config._attn_implementation == own
    assert targets.shape == guided_selection(guided(vlm)[0], inputs).scores.shape

    model.set_attn_implementation("eager")
    maps = torch.stack(model(**inputs, output_attentions=True).attentions).mean(dim=(0, 2))
    rows = torch.stack([maps[0, -3:-1].mean(dim=0), maps[1, -4:-1].mean(dim=0)])
    visual = [row[ids == family.image_token_id] for row, ids in zip(rows, inputs["input_ids"])]
    numbers = [len(targets) // 2] * 2  # images or tiles per prompt
    expected = [image / image.sum() for own, number in zip(visual, numbers) for image in own.chunk(number)]
    for image, target in zip(expected, targets):
        torch.testing.assert_close(target[: len(image)], image, atol=1e-5, rtol=1e-3)
        assert not target[len(image) :].any()


def test_attention_targets_need_the_unpruned_model():
    model, _ = guided(BY_NAME["llava"])
    with pytest.raises(ValueError):
        targets_of_attention(model, make_inputs(BY_NAME["llava"]), [1, 1])


def test_guided_selection_needs_a_guide():
    model = BY_NAME["llava"].make()
    apply_patch_selection(model, "1:image:0.5")
    with pytest.raises(ValueError):
        guided_selection(model, make_inputs(BY_NAME["llava"]))


def test_region_masks():
    images = [PIL.Image.new("RGB", (10, 6), "red")] * 3
    masks = region_masks(images, [(2, 1, 5, 3), None, (4, 4, 4, 4)])
    assert [mask.getbbox() for mask in masks] == [(2, 1, 5, 3), None, (4, 4, 5, 5)]
    assert all(mask.size == (10, 6) for mask in masks)


@torch.no_grad()
def test_the_answer_does_not_choose():
    """`guided_selection` and `prune_inputs` read the prompt without the answer."""
    vlm = BY_NAME["llava"]
    (model, _), unpruned = guided(vlm), vlm.make()
    inputs = make_inputs(vlm, [1])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    scores, features = [], []
    for answer in (7, 77):
        own = {**inputs, "input_ids": inputs["input_ids"].clone(), "labels": labels}
        own["input_ids"][:, -2:] = answer
        scores.append(guided_selection(model, own).scores)
        features.append(prune_inputs(unpruned, own, 5)["mm_encoder_outputs"]["image"].pooler_output[0])
    torch.testing.assert_close(*scores)
    assert torch.equal(*features)
