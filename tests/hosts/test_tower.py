"""Selection inside the towers of generative models: against masked attention, padding, prompts, faulty images."""

import pytest
import torch
from tiny_vlms import (
    BY_NAME,
    COUNTS,
    ENCODER_INPUTS,
    IMAGE,
    VLMS,
    Vlm,
    families,
    grid_and_packed,
    make_inputs,
    rows_alone,
)
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_window_index

from modeling_trips.hosts import TextGuide, apply_patch_selection, record_patch_selection, remove_patch_selection
from modeling_trips.hosts.vlm.wrapper import selection_of


TOLERANCE = {"atol": 1e-5, "rtol": 0}
WITH_CLASS_TOKEN = ("llava", "llava_next", "internvl")


class MaskingAttention:
    """
    Attention that masks dropped patches in the layers above. All tokens keep their places, and the states of the kept
    patches must equal those of the shorter sequence.
    """

    def __init__(self, modules: list[nn.Module], hidden_from: dict[int, torch.Tensor], num_others: int | None):
        self.numbers = {module: number for number, module in enumerate(modules, start=1)}
        self.hidden_from, self.num_others, self.first = hidden_from, num_others, {}

    def __call__(self, module, query, key, value, attention_mask=None, scaling=1.0, **kwargs):
        number = self.numbers[module]
        logits = query @ key.transpose(2, 3) * scaling
        for layer, is_hidden in self.hidden_from.items():
            if number > layer:
                if self.num_others is not None:  # a grid per image
                    is_hidden = nn.functional.pad(is_hidden, (self.num_others, 0))[:, None, None]
                else:  # packed, segment by segment
                    first = self.first.get((module, layer), 0)
                    is_hidden = is_hidden[0, first : first + key.shape[2]]
                    self.first[module, layer] = first + key.shape[2]
                logits = logits.masked_fill(is_hidden, -1e9)
        return (logits.softmax(dim=-1) @ value).transpose(1, 2), None


def patches_of_units(units: torch.Tensor) -> torch.Tensor:
    """Return the patches of marked units in a grid of 8 x 8 patches."""
    side = round(units.shape[1] ** 0.5)
    grid = units.unflatten(1, (side, side))
    return grid.repeat_interleave(8 // side, 1).repeat_interleave(8 // side, 2).flatten(1)


def tower_layers(model: nn.Module) -> nn.ModuleList:
    base = model.model
    if hasattr(base, "visual"):
        return base.visual.blocks
    tower = base.vision_model if hasattr(base, "vision_model") else base.vision_tower
    encoder = getattr(tower, "vision_model", tower).encoder
    return encoder.layer if hasattr(encoder, "layer") else encoder.layers


def hidden_patches(vlm: Vlm, model: nn.Module, inputs: dict, kept: torch.Tensor, num_units: int) -> torch.Tensor:
    """Return a mask of the dropped patches in the tower's order, `(num_images, num_patches)`, packed in one row."""
    if vlm.kind != "packed":
        return patches_of_units(torch.ones(len(kept), num_units, dtype=torch.bool).scatter(1, kept, False))
    units = []
    for grid, row in zip(inputs["image_grid_thw"], kept):
        own = torch.ones(int(grid.prod()) // 4, dtype=torch.bool)
        own[row[row >= 0]] = False
        units.append(own)
    units = torch.cat(units)
    if vlm.name == "qwen2_5_vl":
        units = units[get_vision_window_index(inputs["image_grid_thw"], 2, 16, 4)[0]]
    return units.repeat_interleave(4)[None]


@families
@pytest.mark.parametrize("schedule", ["1:image:0.5", "1:image:0.6,2:random:0.5"])
@torch.no_grad()
def test_kept_patches_match_masked_attention(vlm, schedule):
    model, inputs = vlm.make(), make_inputs(vlm, [1, 2])
    apply_patch_selection(model, schedule)
    with record_patch_selection(model) as recorded:
        pruned = selection_of(model).prune(inputs)
    *selections, visual = recorded
    features = pruned["mm_encoder_outputs"]["image"]
    remove_patch_selection(model)

    modules = [next(part for name, part in layer.named_children() if "att" in name) for layer in tower_layers(model)]
    num_units = selections[0].candidate_indices.shape[1]
    hidden_from = {
        layer: hidden_patches(vlm, model, inputs, selection.kept_indices, num_units)
        for layer, selection in enumerate(selections, start=1)
    }
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
    assert len(kept) == len(groups) and 0 < sum(map(len, kept)) < sum(map(len, groups))
    own_layers = [features.pooler_output, *(features.get("deepstack_features") or [])]
    whole_layers = [groups, *(whole.get("deepstack_features") or [])]
    for own_layer, whole_layer in zip(own_layers, whole_layers, strict=True):
        for own, expected, index in zip(own_layer, whole_layer, kept):
            torch.testing.assert_close(own, expected[index], atol=1e-5 * float(expected.abs().max()), rtol=0)


def scores_by_hand(query, key, scaling, num_others):
    """Compute the attention of [CLS], or of the mean of all queries, to the patches, averaged over the heads."""
    query = query[:, :, 0] if num_others else query.mean(dim=2)
    logits = (key[:, :, num_others:] @ query.unsqueeze(-1)).squeeze(-1) * scaling
    return logits.softmax(dim=-1).mean(dim=1)


@pytest.mark.parametrize("vlm", [vlm for vlm in VLMS if vlm.kind != "packed"], ids=lambda vlm: vlm.name)
@torch.no_grad()
def test_units_with_the_highest_attention_are_kept(vlm):
    model, inputs = vlm.make(), make_inputs(vlm, [1, 1])
    layer = tower_layers(model)[1]
    module, seen = next(part for name, part in layer.named_children() if "att" in name), []
    num_others = int(vlm.name in WITH_CLASS_TOKEN)

    def watching(own, query, key, value, attention_mask=None, scaling=1.0, **kwargs):
        if own is module:
            seen.append(scores_by_hand(query, key, scaling, num_others))
        return nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None

    apply_patch_selection(model, "2:image:0.3")
    ALL_ATTENTION_FUNCTIONS["watching"] = watching
    module.config._attn_implementation = "watching"
    with record_patch_selection(model) as recorded:
        model(**inputs)
    kept = recorded[0].kept_indices
    num_units = recorded[0].candidate_indices.shape[1]
    side = round(num_units**0.5)
    size = 8 // side
    units = seen[0].unflatten(1, (side, size, side, size)).sum(dim=(2, 4)).flatten(1)
    expected = units.topk(kept.shape[1], dim=1).indices.sort(dim=1).values
    assert torch.equal(kept, expected)


@families
@torch.no_grad()
def test_batches_select_patches_like_single_prompts(vlm):
    model = vlm.make()
    guide = TextGuide.for_model(model)
    apply_patch_selection(model, "2:text:0.4", visual_tokens=9, guide=guide)
    inputs = make_inputs(vlm, COUNTS)
    logits = model(**inputs).logits
    length = logits.shape[1]
    for row, own in enumerate(rows_alone(vlm, COUNTS)):
        alone = model(**own).logits[0]
        torch.testing.assert_close(logits[row, length - len(alone) :], alone, **TOLERANCE)


@grid_and_packed
@torch.no_grad()
def test_patches_depend_on_the_prompt(vlm):
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    apply_patch_selection(model, "1:text:0.3", guide=TextGuide.for_model(model))
    kept = []
    for word in (20, 60):
        inputs["input_ids"][:, -3:] = word
        with record_patch_selection(model) as recorded:
            model(**inputs)
        kept.append(recorded[0].kept_indices)
    assert kept[0].shape == kept[1].shape and not torch.equal(*kept)


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
@pytest.mark.parametrize(("keep_rates", "num_real"), [((0.4,), 7), ((0.8,), 8), ((0.8, 0.5), 7)])
def test_padding_patches_come_last_and_change_nothing(name, keep_rates, num_real):
    vlm = BY_NAME[name]
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    mask = torch.ones(1, 2, 32, 32, dtype=torch.bool)
    mask[:, 1, :, 16:] = False  # the right half of the second tile, 8 of its 16 units
    inputs["pixel_attention_mask"] = mask
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][:, 1, :, :, 16:] = 3.0
    schedule = ",".join(f"{layer}:image:{rate}" for layer, rate in enumerate(keep_rates, start=1))
    apply_patch_selection(model, schedule)
    is_real = torch.arange(16) % 4 < 2
    features = []
    for own in (inputs, other):
        with torch.no_grad(), record_patch_selection(model) as recorded:
            whole, padded = selection_of(model).prune(own)["mm_encoder_outputs"]["image"].pooler_output
        kept = recorded[-1].kept_indices[1]
        assert torch.equal(kept, recorded[-2].kept_indices[1]) and is_real[kept].sum() == num_real
        features.append(torch.cat([whole, padded[is_real[kept]]]))
    torch.testing.assert_close(*features, atol=1e-5, rtol=0)


def padded_anyres(vlm: Vlm) -> dict:
    """An image of 16 x 64 pixels: padding is the upper and the lower quarter of both of its tiles."""
    inputs = make_inputs(vlm, [1])
    inputs["image_sizes"] = torch.tensor([[16, 64]])
    dropped = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0][-4 * 17 :]
    stays = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool).index_fill(0, dropped, False)
    return {name: value[:, stays] if value.shape[:2] == (1, len(stays)) else value for name, value in inputs.items()}


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize(("keep_rates", "num_real"), [((0.4,), 26), ((0.8,), 32), ((0.8, 0.5), 26)])
def test_padding_of_tiles_comes_last(name, keep_rates, num_real):
    vlm = BY_NAME[name]
    model = vlm.make()
    schedule = ",".join(f"{layer}:image:{rate}" for layer, rate in enumerate(keep_rates, start=1))
    apply_patch_selection(model, schedule)
    with torch.inference_mode(), record_patch_selection(model) as recorded:
        logits = model(**padded_anyres(vlm)).logits
    is_real = (torch.arange(64) // 8 >= 2) & (torch.arange(64) // 8 < 6)
    assert [int(is_real[kept].sum()) for kept in recorded[-2].kept_indices[1:]] == [num_real] * 2
    assert logits.isfinite().all()


@grid_and_packed
@torch.no_grad()
def test_a_faulty_image_changes_no_other_row(vlm):
    model, inputs = vlm.make(), make_inputs(vlm, [1, 1])
    apply_patch_selection(model, "1:text:0.5,2:image:0.5", visual_tokens=5, guide=TextGuide.for_model(model))
    with record_patch_selection(model) as recorded:
        expected = model(**inputs).logits
    kept = [selection.kept_indices.shape for selection in recorded]
    first_half = inputs["image_grid_thw"][0].prod() if vlm.kind == "packed" else 1
    inputs["pixel_values"][:first_half] = torch.nan
    with record_patch_selection(model) as recorded:
        logits = model(**inputs).logits
    assert [selection.kept_indices.shape for selection in recorded] == kept
    assert logits[0].isnan().any()
    assert torch.equal(logits[1], expected[1])
