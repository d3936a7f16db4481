"""Visual tokens dropped between the tower and the language model: against tokens dropped by hand, and bad inputs."""

import pytest
import torch
from tiny_vlms import (
    BY_NAME,
    COUNTS,
    ENCODER_INPUTS,
    IMAGE,
    OTHERS,
    TEXT,
    VLMS,
    Vlm,
    grid_and_packed,
    keep_even,
    make_inputs,
    rows_alone,
)
from torch import nn

from modeling_trips.hosts import (
    TextGuide,
    apply_patch_selection,
    prune_inputs,
    record_patch_selection,
    remove_patch_selection,
)
from modeling_trips.modeling_trips_text import CACHE_NAME


TOLERANCE = {"atol": 1e-5, "rtol": 0}
all_families = pytest.mark.parametrize("vlm", [*VLMS, *OTHERS], ids=lambda vlm: vlm.name)


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


@grid_and_packed
@pytest.mark.parametrize("scorer", ["prompt", "divprune"])
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


@pytest.mark.parametrize(
    "name, num_before, num_after", [("llava", 0, 0), ("smolvlm", 2, 1), ("internvl", 1, 1), ("gemma3", 2, 2)]
)
@torch.no_grad()
def test_the_text_after_the_last_image_scores(name, num_before, num_after):
    """Tokens that the processor writes around an image, `num_before` and `num_after`, are no text."""
    vlm = BY_NAME[name]
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    ids, embed = inputs["input_ids"], model.get_input_embeddings()
    prompts = []

    def keep_first(features, prompt, prompt_mask, num_kept):
        prompts.append(prompt[0, prompt_mask[0]])  # all images and tiles have the same
        return torch.arange(num_kept).expand(len(features), -1), features[:, :num_kept]

    is_visual = ids[0] == IMAGE
    first, end = int(is_visual.nonzero()[0]), int(is_visual.nonzero()[-1]) + 1
    prune_inputs(model, inputs, 5, scorer=keep_first)
    # Without text after the last image, all text.
    pixels = {name: value for name, value in inputs.items() if name in ENCODER_INPUTS}
    prune_inputs(model, {"input_ids": ids[:, :end], **pixels}, 5, scorer=keep_first)
    assert torch.equal(prompts[0], embed(ids[0, end + num_after :]))
    assert torch.equal(prompts[1], embed(ids[0, 1 : first - num_before]))  # without the token of the beginning


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
@torch.no_grad()
def test_special_tokens_do_not_score(name):
    """They are those that the configuration names: the end of a turn, padding, and in Qwen-VL the marks of images."""
    vlm = BY_NAME[name]
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    pruned = prune_inputs(model, inputs, 5)
    prompts = []

    def keep_first(features, prompt, prompt_mask, num_kept):
        prompts.append(prompt[0, prompt_mask[0]])
        return torch.arange(num_kept).expand(len(features), -1), features[:, :num_kept]

    prune_inputs(model, inputs, 5, scorer=keep_first)
    ends = torch.tensor([[TEXT["eos_token_id"], TEXT["bos_token_id"]]])
    longer = {"input_ids": torch.cat([inputs["input_ids"], ends], dim=1)}
    for key in ("attention_mask", "mm_token_type_ids"):
        if key in inputs:
            value = 1 if key == "attention_mask" else 0
            longer[key] = nn.functional.pad(inputs[key], (0, 2), value=value)
    prune_inputs(model, {**inputs, **longer}, 5, scorer=keep_first)
    assert torch.equal(prompts[0], prompts[1])
    image = pruned["mm_encoder_outputs"]["image"].pooler_output[0]
    same = prune_inputs(model, {**inputs, **longer}, 5)["mm_encoder_outputs"]["image"].pooler_output[0]
    assert torch.equal(image, same)
    embeddings = model.get_input_embeddings()(longer["input_ids"])
    others = {key: value for key, value in {**inputs, **longer}.items() if key != "input_ids"}
    prune_inputs(model, {**others, "inputs_embeds": embeddings}, 5, scorer=keep_first)
    assert torch.equal(prompts[0], prompts[2])


@pytest.mark.parametrize("name", ["llava", "smolvlm", "internvl"])
@torch.no_grad()
def test_a_scorer_may_read_attention(name):
    """It is what a layer that selects by the image would score, of the tokens that are left."""
    vlm = BY_NAME[name]
    model, inputs = vlm.make(), make_inputs(vlm, [1, 1])
    read = []

    def keep_attended(features, prompt, prompt_mask, num_kept, attention):
        read.append(attention)
        kept = attention.topk(num_kept, dim=-1).indices.sort(dim=-1).values
        return kept, features.gather(1, kept.unsqueeze(-1).expand(-1, -1, features.shape[-1]))

    for earlier in ("", "1:image:0.5,"):
        apply_patch_selection(model, f"{earlier}{vlm.num_layers}:image:0.9")
        with record_patch_selection(model) as recorded:
            model(**inputs)
        expected = recorded[-2].scores
        apply_patch_selection(model, earlier.strip(",") or None, visual_tokens=3, scorer=keep_attended)
        with record_patch_selection(model) as recorded:
            model(**inputs)
        torch.testing.assert_close(read[-1], expected)
    pruned = prune_inputs(
        model, inputs, visual_tokens=3, scorer=keep_attended
    )  # layers of a patched model do not select
    assert read[-1].shape[1] == vlm.tokens and (pruned["input_ids"] == IMAGE).sum() == 3 * len(read[-1])
    remove_patch_selection(model)
    assert torch.equal(prune_inputs(model, inputs, 3, scorer=keep_attended)["input_ids"], pruned["input_ids"])
    torch.testing.assert_close(*read[-2:])


@torch.no_grad()
def test_tokens_of_a_scorer_keep_their_order():
    """A scorer may return the best tokens first, but not another number of them."""
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm, [1, 2])

    def keep_longest(features, prompt, prompt_mask, num_kept, in_order=True):
        kept = features.norm(dim=-1).topk(num_kept, dim=-1).indices
        if in_order:
            kept = kept.sort(dim=-1).values
        return kept, features.gather(1, kept.unsqueeze(-1).expand(-1, -1, features.shape[-1]))

    def best_first(features, prompt, prompt_mask, num_kept):
        return keep_longest(features, prompt, prompt_mask, num_kept, in_order=False)

    def too_few(features, prompt, prompt_mask, num_kept):
        return keep_longest(features, prompt, prompt_mask, num_kept - 1)

    expected = model(**prune_inputs(model, inputs, 5, scorer=keep_longest)).logits
    assert torch.equal(model(**prune_inputs(model, inputs, 5, scorer=best_first)).logits, expected)
    with pytest.raises(ValueError, match="positions"):
        prune_inputs(model, inputs, 5, scorer=too_few)


@torch.no_grad()
def test_attention_that_a_tower_does_not_have_is_refused():
    vlm = BY_NAME["qwen3_vl"]
    for call in (prune_inputs, lambda model, inputs, **options: apply_patch_selection(model, **options)):
        with pytest.raises(TypeError, match="attention"):
            call(vlm.make(), make_inputs(vlm, [1]), visual_tokens=4, scorer="vispruner")


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
@torch.no_grad()
def test_the_number_counts_per_tile(name):
    vlm = BY_NAME[name]
    model, inputs = vlm.make(), make_inputs(vlm, [1, 2])  # of two tiles each
    pruned = prune_inputs(model, inputs, visual_tokens=6)
    assert (pruned["input_ids"] == IMAGE).sum(dim=1).tolist() == [2 * 6, 4 * 6]
    with pytest.raises(ValueError, match="visual_tokens"):
        prune_inputs(model, inputs, visual_tokens=vlm.tokens + 1)


@torch.no_grad()
def test_empty_prompt():
    model = BY_NAME["llava"].make()
    inputs = {"input_ids": torch.full((1, 64), IMAGE), "pixel_values": torch.randn(1, 3, 32, 32)}
    apply_patch_selection(model, "1:text:0.5", visual_tokens=5, guide=TextGuide.for_model(model))
    logits = model(**inputs).logits
    assert logits.shape[1] == 5 and logits.isfinite().all()


@grid_and_packed
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
    for scorer in ("divprune", "random", "pooling"):
        assert prune_inputs(model, covered, 4, scorer=scorer)["labels"].shape[1] == inputs["input_ids"].shape[1] - 60
    for scorer in ("prompt", keep_even):
        with pytest.raises(ValueError, match="labels"):
            prune_inputs(model, covered, 4, scorer=scorer)
    labels = inputs["input_ids"].clone()
    labels[0, :-2] = -100  # the second row has no image
    assert (prune_inputs(model, {**inputs, "labels": labels}, 4)["input_ids"] == IMAGE).sum() == 4


@grid_and_packed
@pytest.mark.parametrize("schedule", ["1:text:0.5", "unpruned"])
@torch.no_grad()
def test_placeholders_that_do_not_match_raise(vlm, schedule):
    model, inputs = vlm.make(), make_inputs(vlm, [1, 1])
    guide = TextGuide.for_model(model) if "text" in schedule else None
    apply_patch_selection(model, schedule, visual_tokens=5, guide=guide)
    expected = model(**inputs).logits
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
    assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_bad_inputs_raise():
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm)
    with pytest.raises(ValueError, match="visual_tokens"):
        prune_inputs(model, inputs, visual_tokens=65)
    qwen = BY_NAME["qwen2_vl"]
    with pytest.raises(ValueError, match="videos"):
        prune_inputs(qwen.make(), {**make_inputs(qwen), "pixel_values_videos": torch.ones(1)}, 5)
    video = {"input_ids": torch.tensor([[5, 6, 7]]), "pixel_values_videos": torch.ones(4, 96)}  # alone
    patched = qwen.make()
    apply_patch_selection(patched, visual_tokens=5)
    for call in (patched, patched.generate):
        with pytest.raises(ValueError, match="videos"):
            call(**video)
    apply_patch_selection(model, "1:image:0.5")
    cache = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="conversation"):
        model.generate(**inputs, max_new_tokens=2, **{CACHE_NAME: cache})
