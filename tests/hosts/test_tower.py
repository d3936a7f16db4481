"""Selection inside the towers of generative models: against masked attention, padding, prompts, faulty images."""

import pytest
import torch
from tiny_vlms import (
    BY_NAME,
    COUNTS,
    ENCODER_INPUTS,
    IMAGE,
    VLMS,
    families,
    grid_and_packed,
    make_both,
    make_inputs,
    rows_alone,
)
from torch import nn
from torch.testing import assert_close
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_window_index

from modeling_trips.hosts import TextGuide, apply_patch_selection, record_patch_selection, remove_patch_selection
from modeling_trips.hosts.vlm.wrapper import selection_of


pytestmark = pytest.mark.usefixtures("no_grad")
TOLERANCE = {"atol": 1e-5, "rtol": 0}
WITH_CLASS_TOKEN = ("llava", "llava_next", "internvl")


class MaskingAttention:
    """
    Attention that masks dropped patches in the layers above. All tokens keep their places, and the states of the kept
    patches must equal those of the shorter sequence.
    """

    def __init__(self, modules, hidden_from, num_others):
        self.numbers = {module: number for number, module in enumerate(modules, start=1)}
        self.hidden_from = hidden_from
        self.num_others = num_others
        self.starts = dict.fromkeys(modules, 0)  # where the next segment of packed patches begins

    def __call__(self, module, query, key, value, attention_mask=None, scaling=1.0, **kwargs):
        logits = query @ key.transpose(2, 3) * scaling
        start = self.starts[module]
        end = start + key.shape[2]
        self.starts[module] = end
        for layer, is_hidden in self.hidden_from.items():
            if self.numbers[module] <= layer:
                continue
            if self.num_others is not None:  # a grid per image
                is_hidden = nn.functional.pad(is_hidden, (self.num_others, 0))[:, None, None]
            else:
                is_hidden = is_hidden[0, start:end]
            logits = logits.masked_fill(is_hidden, -1e9)
        states = logits.softmax(dim=-1) @ value
        return states.transpose(1, 2), None


def patches_of_units(units):
    """Return the patches of marked units in a grid of 8 x 8 patches."""
    side = round(units.shape[1] ** 0.5)
    size = 8 // side
    grid = units.unflatten(1, (side, side))
    return grid.repeat_interleave(size, 1).repeat_interleave(size, 2).flatten(1)


def tower_layers(model):
    base = model.model
    if hasattr(base, "visual"):
        return base.visual.blocks
    tower = base.vision_model if hasattr(base, "vision_model") else base.vision_tower
    encoder = getattr(tower, "vision_model", tower).encoder
    return encoder.layer if hasattr(encoder, "layer") else encoder.layers


def attention_of(layer):
    return next(part for name, part in layer.named_children() if "att" in name)


def hidden_patches(vlm, inputs, kept, num_units):
    """Return a mask of the dropped patches in the tower's order, `(num_images, num_patches)`, packed in one row."""
    if vlm.kind != "packed":
        is_dropped = torch.ones(len(kept), num_units, dtype=torch.bool).scatter(1, kept, False)
        return patches_of_units(is_dropped)
    images = []
    for grid, row in zip(inputs["image_grid_thw"], kept):
        is_dropped = torch.ones(int(grid.prod()) // 4, dtype=torch.bool)
        is_dropped[row[row >= 0]] = False
        images.append(is_dropped)
    units = torch.cat(images)
    if vlm.name == "qwen2_5_vl":
        window_index, _ = get_vision_window_index(inputs["image_grid_thw"], 2, 16, 4)
        units = units[window_index]
    return units.repeat_interleave(4)[None]


@families
@pytest.mark.parametrize("schedule", ["1:image:0.5", "1:image:0.6,2:random:0.5"])
def test_kept_patches_match_masked_attention(vlm, schedule):
    model = vlm.make()
    inputs = make_inputs(vlm, [1, 2])
    apply_patch_selection(model, schedule)
    with record_patch_selection(model) as recorded:
        pruned = selection_of(model).prune_call(inputs)
    *selections, visual = recorded
    features = pruned["mm_encoder_outputs"]["image"]
    remove_patch_selection(model)

    modules = [attention_of(layer) for layer in tower_layers(model)]
    num_units = selections[0].candidate_indices.shape[1]
    hidden_from = {}
    for layer, selection in enumerate(selections, start=1):
        hidden_from[layer] = hidden_patches(vlm, inputs, selection.kept_indices, num_units)
    num_others = None if vlm.kind == "packed" else int(vlm.name in WITH_CLASS_TOKEN)
    ALL_ATTENTION_FUNCTIONS["masking"] = MaskingAttention(modules, hidden_from, num_others)
    for module in modules:
        module.config._attn_implementation = "masking"
    encoder = {name: inputs[name] for name in ENCODER_INPUTS if name in inputs}
    whole = model.model.get_image_features(**encoder, return_dict=True)
    groups = whole.pooler_output
    if vlm.kind == "tiles":  # of a prompt are one tensor
        groups = torch.cat(groups).split(vlm.tokens)
    kept = [row[row >= 0] for row in visual.kept_indices]
    assert 0 < sum(map(len, kept)) < sum(map(len, groups))
    layers = [features.pooler_output, *(features.get("deepstack_features") or [])]
    expected_layers = [groups, *(whole.get("deepstack_features") or [])]
    for layer, expected_layer in zip(layers, expected_layers, strict=True):
        for image, expected, index in zip(layer, expected_layer, kept, strict=True):
            atol = 1e-5 * float(expected.abs().max())
            assert_close(image, expected[index], atol=atol, rtol=0)


@pytest.mark.parametrize("vlm", [vlm for vlm in VLMS if vlm.kind != "packed"], ids=lambda vlm: vlm.name)
def test_units_with_the_highest_attention_are_kept(vlm):
    model = vlm.make()
    attention = attention_of(tower_layers(model)[1])
    scores = []

    def watching(module, query, key, value, attention_mask=None, scaling=1.0, **kwargs):
        if module is attention:
            if vlm.name in WITH_CLASS_TOKEN:
                scoring = query[:, :, :1]
                patches = key[:, :, 1:]
            else:
                scoring = query.mean(dim=2, keepdim=True)
                patches = key
            logits = scoring @ patches.transpose(2, 3) * scaling  # (num_images, num_heads, 1, num_patches)
            scores.append(logits.softmax(dim=-1).mean(dim=(1, 2)))
        states = nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)
        return states.transpose(1, 2), None

    apply_patch_selection(model, "2:image:0.3")
    ALL_ATTENTION_FUNCTIONS["watching"] = watching
    attention.config._attn_implementation = "watching"
    with record_patch_selection(model) as recorded:
        model(**make_inputs(vlm, [1, 1]))
    kept = recorded[0].kept_indices
    num_units = recorded[0].candidate_indices.shape[1]
    side = round(num_units**0.5)
    size = 8 // side
    units = scores[0].unflatten(1, (side, size, side, size)).sum(dim=(2, 4)).flatten(1)
    expected = units.topk(kept.shape[1], dim=1).indices.sort(dim=1).values
    assert torch.equal(kept, expected)


@families
def test_batches_select_patches_like_single_prompts(vlm):
    model = vlm.make()
    guide = TextGuide.for_model(model)
    apply_patch_selection(model, "2:text:0.4", visual_tokens=9, guide=guide)
    logits = model(**make_inputs(vlm, COUNTS)).logits
    for row, inputs in enumerate(rows_alone(vlm, COUNTS)):
        alone = model(**inputs).logits[0]
        assert_close(logits[row, -len(alone) :], alone, **TOLERANCE)


@grid_and_packed
def test_patches_depend_on_the_prompt(vlm):
    model = vlm.make()
    inputs = make_inputs(vlm, [1])
    apply_patch_selection(model, "1:text:0.3", guide=TextGuide.for_model(model))
    kept = []
    for word in (20, 60):
        inputs["input_ids"][:, -3:] = word
        with record_patch_selection(model) as recorded:
            model(**inputs)
        kept.append(recorded[0].kept_indices)
    assert kept[0].shape == kept[1].shape
    assert not torch.equal(*kept)


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
@pytest.mark.parametrize(
    "schedule, num_real", [("1:image:0.4", 7), ("1:image:0.8", 8), ("1:image:0.8,2:image:0.5", 7)]
)
def test_padding_patches_come_last_and_change_nothing(name, schedule, num_real):
    model, inputs = make_both(name, [1])
    mask = torch.ones(1, 2, 32, 32, dtype=torch.bool)
    mask[:, 1, :, 16:] = False  # the right half of the second tile, 8 of its 16 units
    inputs["pixel_attention_mask"] = mask
    apply_patch_selection(model, schedule)
    is_real = torch.arange(16) % 4 < 2
    features = []
    for value in (0.0, 3.0):
        inputs["pixel_values"][:, 1, :, :, 16:] = value
        with record_patch_selection(model) as recorded:
            pruned = selection_of(model).prune_call(inputs)
        whole, padded = pruned["mm_encoder_outputs"]["image"].pooler_output
        kept = recorded[-1].kept_indices[1]
        assert torch.equal(kept, recorded[-2].kept_indices[1])
        assert is_real[kept].sum() == num_real
        features.append(torch.cat([whole, padded[is_real[kept]]]))
    assert_close(*features, atol=1e-5, rtol=0)


def padded_anyres(vlm):
    """An image of 16 x 64 pixels: padding is the upper and the lower quarter of both of its tiles."""
    inputs = make_inputs(vlm, [1])
    inputs["image_sizes"] = torch.tensor([[16, 64]])
    ids = inputs["input_ids"]
    places = (ids[0] == IMAGE).nonzero()[:, 0]
    stays = torch.ones_like(ids[0], dtype=torch.bool)
    stays[places[-4 * 17 :]] = False
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, stays]
    return inputs


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize(
    "schedule, num_real", [("1:image:0.4", 26), ("1:image:0.8", 32), ("1:image:0.8,2:image:0.5", 26)]
)
def test_padding_of_tiles_comes_last(name, schedule, num_real):
    vlm = BY_NAME[name]
    model = vlm.make()
    apply_patch_selection(model, schedule)
    with torch.inference_mode(), record_patch_selection(model) as recorded:
        logits = model(**padded_anyres(vlm)).logits
    is_real = torch.zeros(8, 8, dtype=torch.bool)
    is_real[2:6] = True
    kept = recorded[-2].kept_indices[1:]  # of the tiles, without the whole image
    assert is_real.flatten()[kept].sum(dim=1).tolist() == [num_real, num_real]
    assert logits.isfinite().all()


@grid_and_packed
def test_a_faulty_image_changes_no_other_row(vlm):
    model = vlm.make()
    inputs = make_inputs(vlm, [1, 1])
    apply_patch_selection(model, "1:text:0.5,2:image:0.5", visual_tokens=5, guide=TextGuide.for_model(model))
    expected = model(**inputs).logits
    first_half = inputs["image_grid_thw"][0].prod() if vlm.kind == "packed" else 1
    inputs["pixel_values"][:first_half] = torch.nan
    logits = model(**inputs).logits
    assert logits[0].isnan().any()
    assert torch.equal(logits[1], expected[1])
