"""
Patch selection in generative vision-language models for each family: against the unpatched model, against tokens
dropped by hand, and against a tower that masks the dropped patches in attention.
"""

import pytest
import torch
import transformers
from tiny_vlms import BY_NAME, IMAGE, OTHERS, VLMS, Vlm, make_inputs
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_window_index

from modeling_trips.hosts import (
    TextGuide,
    apply_patch_selection,
    prune_inputs,
    record_patch_selection,
    remove_patch_selection,
)
from modeling_trips.hosts.vlm.wrapper import selection_of
from modeling_trips.modeling_trips_base import CACHE_NAME


TOLERANCE = {"atol": 1e-5, "rtol": 0}
WITH_CLASS_TOKEN = ("llava", "llava_next", "internvl")
COUNTS = [1, 2, 0]  # images per prompt
ENCODER_INPUTS = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images")
families = pytest.mark.parametrize("vlm", VLMS, ids=lambda vlm: vlm.name)
all_families = pytest.mark.parametrize("vlm", [*VLMS, *OTHERS], ids=lambda vlm: vlm.name)


def keep_even(features, prompt, prompt_mask, num_kept):
    """Scorer that keeps the even tokens."""
    kept = torch.arange(0, 2 * num_kept, 2).expand(len(features), -1)
    return kept, features[:, ::2][:, :num_kept]


def rows_alone(vlm: Vlm, counts: list[int]):
    """Return the prompts of `make_inputs(vlm, counts)` one by one, without padding."""
    batch = make_inputs(vlm, counts)
    image = patch = 0
    for row, count in enumerate(counts):
        present = batch["attention_mask"][row].bool()
        own = {
            name: value[row : row + 1, present]
            for name, value in batch.items()
            if value.shape[:2] == batch["input_ids"].shape
        }
        if count and vlm.kind == "tiles":
            own["pixel_values"] = batch["pixel_values"][row : row + 1, : 2 * count]
        elif count and vlm.kind == "packed":
            own["image_grid_thw"] = batch["image_grid_thw"][image : image + count]
            length = int(own["image_grid_thw"].prod(dim=1).sum())
            own["pixel_values"] = batch["pixel_values"][patch : patch + length]
            patch += length
        elif count:
            for name in ("pixel_values", "image_sizes", "batch_num_images"):
                if name in batch:
                    own[name] = batch[name][image : image + count]
        image += count
        yield own


def logits_by_hand(model: nn.Module, vlm: Vlm, inputs: dict) -> torch.Tensor:
    """Compute the logits of one prompt without its odd visual tokens, from features, embeddings and positions."""
    base, ids = model.model, inputs["input_ids"]
    encoder = {name: inputs[name] for name in ENCODER_INPUTS if name in inputs}
    features, stays, layers = [], ids[0] != IMAGE, []
    if encoder:
        output = base.get_image_features(**encoder, return_dict=True)
        layers = output.get("deepstack_features") or []
        starts = [0]
        for group in output.pooler_output:
            starts.append(starts[-1] + len(group))
        kept = torch.cat([torch.arange(start, end)[::2] for start, end in zip(starts, starts[1:])])
        features = torch.cat([*output.pooler_output])[kept]
        layers = [torch.cat([*layer])[kept] for layer in layers]
        stays[(ids[0] == IMAGE).nonzero()[kept, 0]] = True
    embeddings = model.get_input_embeddings()(ids)[:, stays].clone()
    is_visual = ids[:, stays] == IMAGE
    if encoder:
        embeddings[is_visual] = features
    arguments = {"inputs_embeds": embeddings}
    base.rope_deltas = None  # of an earlier call
    if "token_type_ids" in inputs:
        arguments["token_type_ids"] = inputs["token_type_ids"][:, stays]
    if vlm.kind == "packed" and encoder:
        positions, _ = base.get_rope_index(
            ids, mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
        )
        arguments["position_ids"] = positions[..., stays]
        arguments["attention_mask"] = torch.ones_like(ids[:, stays])
    if layers:
        states = base.language_model(
            **arguments, visual_pos_masks=is_visual, deepstack_visual_embeds=layers
        ).last_hidden_state
        return model.lm_head(states)
    return model(**arguments).logits


# ---- Between the tower and the language model ----------------------------------------------------------------------


@all_families
@torch.no_grad()
def test_keeping_all_tokens_changes_nothing(vlm):
    model, inputs = vlm.make(), make_inputs(vlm, COUNTS)
    pruned = prune_inputs(model, inputs, keep_rate=1.0)
    present = pruned["attention_mask"].bool()
    assert torch.equal(model(**pruned).logits[present], model(**inputs).logits[inputs["attention_mask"].bool()])
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**pruned, **options), model.generate(**inputs, **options))


@all_families
@pytest.mark.parametrize("padding_side", ["left", "right"])
@torch.no_grad()
def test_logits_match_tokens_dropped_by_hand(vlm, padding_side):
    model = vlm.make()
    pruned = prune_inputs(model, make_inputs(vlm, COUNTS, padding_side), keep_rate=0.5, scorer=keep_even)
    logits, mask = model(**pruned).logits, pruned["attention_mask"].bool()
    assert mask[:, 0 if padding_side == "right" else -1].all()
    for row, own in enumerate(rows_alone(vlm, COUNTS)):
        torch.testing.assert_close(logits[row, mask[row]], logits_by_hand(model, vlm, own)[0], **TOLERANCE)


@all_families
@pytest.mark.parametrize("scorer", ["prompt", "diversity"])
@torch.no_grad()
def test_batches_select_visual_tokens_like_single_prompts(vlm, scorer):
    model = vlm.make()
    options = {"visual_tokens": 7, "scorer": scorer}
    pruned = prune_inputs(model, make_inputs(vlm, COUNTS), **options)
    logits, mask = model(**pruned).logits, pruned["attention_mask"].bool()
    for row, own in enumerate(rows_alone(vlm, COUNTS)):
        alone = prune_inputs(model, own, **options)
        assert torch.equal(pruned["input_ids"][row, mask[row]], alone["input_ids"][0])
        torch.testing.assert_close(logits[row, mask[row]], model(**alone).logits[0], **TOLERANCE)


@all_families
@torch.no_grad()
def test_every_way_to_generate(vlm):
    model = vlm.make()
    pruned = prune_inputs(model, make_inputs(vlm, [1, 2]), keep_rate=0.5)
    alone = prune_inputs(model, list(rows_alone(vlm, [1, 2]))[1], keep_rate=0.5)
    length = pruned["input_ids"].shape[1]

    def generate(inputs: dict, **options) -> torch.Tensor:
        torch.manual_seed(0)
        output = inputs["mm_encoder_outputs"]["image"]
        inputs = {**inputs, "mm_encoder_outputs": {"image": type(output)(**output)}}  # beams repeat it in place
        options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, **options}
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]

    greedy = generate(pruned)
    assert greedy.shape == (2, 6) and length == pruned["input_ids"].shape[1]
    assert torch.equal(greedy, generate(pruned, use_cache=False))
    assert torch.equal(greedy, generate(pruned, cache_implementation="static"))
    assert torch.equal(greedy[1:], generate(alone))
    beams = generate(pruned, num_beams=3, num_return_sequences=2)
    assert beams.shape == (4, 6)
    assert torch.equal(beams[2:], generate(alone, num_beams=3, num_return_sequences=2))
    assert generate(pruned, do_sample=True, num_return_sequences=2).shape == (4, 6)


# ---- Inside the tower ----------------------------------------------------------------------------------------------


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
    kept = [row[row >= 0] for row in visual.kept_indices]
    assert len(kept) == len(whole.pooler_output) and 0 < sum(map(len, kept)) < sum(map(len, whole.pooler_output))
    own_layers = [features.pooler_output, *(features.get("deepstack_features") or [])]
    whole_layers = [whole.pooler_output, *(whole.get("deepstack_features") or [])]
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


@families
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


# ---- One call ------------------------------------------------------------------------------------------------------


@families
@torch.no_grad()
def test_generate_returns_the_callers_prompt(vlm):
    model, inputs = vlm.make(), make_inputs(vlm, [1, 2])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    pruned = prune_inputs(model, inputs, visual_tokens=6)
    expected = model.generate(**pruned, **options)[:, pruned["input_ids"].shape[1] :]
    apply_patch_selection(model, "unpruned", visual_tokens=6)
    length = inputs["input_ids"].shape[1]
    sequences = model.generate(**inputs, **options)
    assert torch.equal(sequences[:, :length], inputs["input_ids"])
    assert torch.equal(sequences[:, length:], expected)
    outputs = model.generate(**inputs, **options, num_beams=2, num_return_sequences=2, return_dict_in_generate=True)
    assert torch.equal(outputs.sequences[::2, :length], inputs["input_ids"])
    text = {name: inputs[name][:, -4:] for name in ("input_ids", "attention_mask")}
    assert model.generate(**text, max_new_tokens=2).shape == (2, 6)


@families
@torch.no_grad()
def test_removal_leaves_no_trace(vlm):
    model, inputs = vlm.make(), make_inputs(vlm, [1, 2])
    own_class, keys, attributes = type(model), [*model.state_dict()], {*vars(model)}
    expected = model(**inputs).logits
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
    for schedule in ("1:image:0.5", "2:text:0.5"):
        guide = TextGuide.for_model(model) if "text" in schedule else None
        apply_patch_selection(model, schedule, visual_tokens=5, guide=guide)
        assert model(**inputs).logits.shape[1] < expected.shape[1]
        assert [*model.state_dict()] == keys and type(model).__name__ == own_class.__name__
    remove_patch_selection(model)
    assert type(model) is own_class and {*vars(model)} == attributes
    assert sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()) == hooks
    assert torch.equal(model(**inputs).logits, expected)


@families
@torch.no_grad()
def test_checkpoints_saved_with_selection_load_without_it(vlm, tmp_path):
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    expected = model(**inputs).logits
    apply_patch_selection(model, "1:image:0.5", visual_tokens=5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded).__name__ == vlm.class_name
    torch.testing.assert_close(loaded(**inputs).logits, expected, **TOLERANCE)


# ---- Errors --------------------------------------------------------------------------------------------------------


def test_unsupported_models_raise():
    for name in ("Florence2", "FastVlm", "Mllama", "Blip2", "InstructBlip"):
        model_class = getattr(transformers, f"{name}ForConditionalGeneration")
        with torch.device("meta"):
            model = model_class(model_class.config_class())
        with pytest.raises(TypeError, match=name):
            apply_patch_selection(model, "1:image:0.5")


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("3:image:0.5", {}),  # LLaVA uses the states of the layer before the last one
        ("1:image:0.5:0.9", {}),
        ("1:text:0.5", {}),
        ("1:image:0.5", {"visual_tokens": 0}),
        ("1:image:0.5", {"scorer": "words"}),
        ("1:image:0.5", {"guide": TextGuide(32, 4, 8)}),
        ("1:text:0.5,2:text:0.5", {"guide": TextGuide(32, 4, 8)}),
        ("1:text:0.5", {"guide": TextGuide(32, 2, 8)}),
    ],
)
@torch.no_grad()
def test_bad_schedules_and_options_raise_and_leave_the_model_unchanged(schedule, options):
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm)
    apply_patch_selection(model, "1:image:0.5")
    expected = model(**inputs).logits
    with pytest.raises(ValueError):
        apply_patch_selection(model, schedule, **options)
    assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_bad_inputs_raise():
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm)
    with pytest.raises(ValueError, match="placeholder"):
        prune_inputs(model, {**inputs, "input_ids": inputs["input_ids"][:, :-20]} | {"attention_mask": None}, 5)
    with pytest.raises(ValueError, match="input_ids"):
        prune_inputs(model, {"pixel_values": inputs["pixel_values"]}, 5)
    with pytest.raises(ValueError, match="labels"):
        prune_inputs(model, {**inputs, "labels": inputs["input_ids"]}, 5)
    with pytest.raises(ValueError, match="keep_rate"):
        prune_inputs(model, inputs, 5, keep_rate=0.5)
    for number in (2.5, True, "5"):
        with pytest.raises(TypeError, match="visual_tokens"):
            prune_inputs(model, inputs, number)
    with pytest.raises(TypeError):
        prune_inputs(nn.Linear(2, 2), inputs, 5)
    qwen = BY_NAME["qwen2_vl"]
    with pytest.raises(ValueError, match="videos"):
        prune_inputs(qwen.make(), {**make_inputs(qwen), "pixel_values_videos": torch.ones(1)}, 5)
    apply_patch_selection(model, "1:image:0.5")
    cache = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="conversation"):
        model.generate(**inputs, max_new_tokens=2, **{CACHE_NAME: cache})


@families
@torch.no_grad()
def test_inputs_embeds_match_input_ids(vlm):
    model, inputs = vlm.make(), make_inputs(vlm, [1, 2])
    apply_patch_selection(model, "1:image:0.5", visual_tokens=7)
    expected = model(**inputs).logits
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(model(**inputs).logits, expected, **TOLERANCE)


@torch.no_grad()
def test_labels_may_cover_prompts_that_are_not_read():
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm, [1, 0])
    covered = {**inputs, "labels": inputs["input_ids"]}
    for scorer in ("diversity", "random", "pooling"):
        assert prune_inputs(model, covered, 4, scorer=scorer)["labels"].shape[1] == inputs["input_ids"].shape[1] - 60
    for scorer in ("prompt", keep_even):
        with pytest.raises(ValueError, match="labels"):
            prune_inputs(model, covered, 4, scorer=scorer)
    labels = inputs["input_ids"].clone()
    labels[0, :-2] = -100  # the second row has no image
    assert (prune_inputs(model, {**inputs, "labels": labels}, 4)["input_ids"] == IMAGE).sum() == 4
