"""Visual tokens dropped between the tower and the language model: against tokens dropped by hand, and bad inputs."""

import pytest
import torch
from by_hand import logits_of_even, logits_of_rest
from tiny_vlms import (
    BY_NAME,
    COUNTS,
    ENCODER_INPUTS,
    IMAGE,
    OTHERS,
    SPECIAL,
    VIDEO,
    VLMS,
    grid_and_packed,
    keep_even,
    make_both,
    make_inputs,
    make_video_inputs,
    rows_alone,
)
from torch import nn
from torch.testing import assert_close

from modeling_trips.hosts import (
    TextGuide,
    apply_patch_selection,
    prune_inputs,
    record_patch_selection,
    remove_patch_selection,
)
from modeling_trips.modeling_trips_text import CACHE_NAME
from modeling_trips.patch_selection import gather_tokens


pytestmark = pytest.mark.usefixtures("no_grad")
TOLERANCE = {"atol": 1e-5, "rtol": 0}
all_families = pytest.mark.parametrize("vlm", [*VLMS, *OTHERS], ids=lambda vlm: vlm.name)


def logits_by_hand(model, inputs):
    """Return the logits of a prompt without the odd visual tokens of each image or tile."""
    encoder = {name: inputs[name] for name in ENCODER_INPUTS if name in inputs}
    if not encoder:
        return model(**inputs).logits
    output = model.model.get_image_features(**encoder, return_dict=True)
    return logits_of_even(model, inputs, output, output.pooler_output)


class PromptReader:
    """Scorer that keeps the first tokens and notes the embeddings of the prompt that it is given."""

    def __init__(self):
        self.prompts = []

    def __call__(self, features, prompt, prompt_mask, num_kept):
        self.prompts.append(prompt[0, prompt_mask[0]])  # all images and tiles have the same
        kept = torch.arange(num_kept).expand(len(features), -1)
        return kept, features[:, :num_kept]


@all_families
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_logits_match_tokens_dropped_by_hand(vlm, padding_side):
    model = vlm.make()
    inputs = make_inputs(vlm, COUNTS, padding_side)
    pruned = prune_inputs(model, inputs, keep_rate=0.5, scorer=keep_even)
    logits = model(**pruned).logits
    mask = pruned["attention_mask"].bool()
    assert mask[:, 0 if padding_side == "right" else -1].all()
    for row, alone in enumerate(rows_alone(vlm, COUNTS)):
        expected = logits_by_hand(model, alone)[0]
        assert_close(logits[row, mask[row]], expected, **TOLERANCE)


@all_families
def test_every_way_to_generate(vlm):
    model = vlm.make()
    pruned = prune_inputs(model, make_inputs(vlm, [1, 2]), keep_rate=0.5)
    _, second_row = rows_alone(vlm, [1, 2])
    alone = prune_inputs(model, second_row, keep_rate=0.5)

    def generate(inputs, do_sample=False, **options):
        output = inputs["mm_encoder_outputs"]["image"]
        inputs = {**inputs, "mm_encoder_outputs": {"image": type(output)(**output)}}  # beams repeat it in place
        sequences = model.generate(**inputs, do_sample=do_sample, max_new_tokens=6, min_new_tokens=6, **options)
        return sequences[:, inputs["input_ids"].shape[1] :]

    greedy = generate(pruned)
    assert greedy.shape == (2, 6)
    assert torch.equal(greedy, generate(pruned, cache_implementation="static"))
    assert torch.equal(greedy[1:], generate(alone))
    beams = generate(pruned, num_beams=3, num_return_sequences=2)
    assert beams.shape == (4, 6)
    assert torch.equal(beams[2:], generate(alone, num_beams=3, num_return_sequences=2))
    assert generate(pruned, do_sample=True, num_return_sequences=2).shape == (4, 6)


@pytest.mark.parametrize(
    "name, num_before, num_after", [("llava", 0, 0), ("smolvlm", 2, 1), ("internvl", 1, 1), ("gemma3", 2, 2)]
)
def test_the_text_after_the_last_image_scores(name, num_before, num_after):
    """Tokens that the processor writes around an image, `num_before` and `num_after`, are no text."""
    vlm = BY_NAME[name]
    model = vlm.make()
    embed = model.get_input_embeddings()
    inputs = make_inputs(vlm, [1])
    ids = inputs["input_ids"]
    places = (ids[0] == IMAGE).nonzero()[:, 0].tolist()
    start = places[0]
    end = places[-1] + 1
    reader = PromptReader()
    prune_inputs(model, inputs, 5, scorer=reader)
    assert torch.equal(reader.prompts[0], embed(ids[0, end + num_after :]))
    # Without text after the last image, all text but the token of the beginning.
    inputs = {"input_ids": ids[:, :end], "pixel_values": inputs["pixel_values"]}
    prune_inputs(model, inputs, 5, scorer=reader)
    assert torch.equal(reader.prompts[1], embed(ids[0, 1 : start - num_before]))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_special_tokens_do_not_score(name):
    """They are those that the configuration names: the end of a turn, padding, and in Qwen-VL the marks of images."""
    model, inputs = make_both(name, [1])
    reader = PromptReader()
    prune_inputs(model, inputs, 5, scorer=reader)
    ends = torch.tensor([[SPECIAL["eos_token_id"], SPECIAL["bos_token_id"]]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ends], dim=1)
    inputs["attention_mask"] = nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    if name == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (0, 2))
    prune_inputs(model, inputs, 5, scorer=reader)
    assert torch.equal(reader.prompts[0], reader.prompts[1])
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    prune_inputs(model, inputs, 5, scorer=reader)
    assert torch.equal(reader.prompts[0], reader.prompts[2])


@pytest.mark.parametrize("name", ["llava", "smolvlm", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_scorer_may_read_attention(name):
    """It is what a layer that selects by the image would score, of the tokens that are left."""
    vlm = BY_NAME[name]
    model = vlm.make()
    inputs = make_inputs(vlm, [1] if vlm.kind == "packed" else [1, 1])
    read = []

    def keep_attended(features, prompt, prompt_mask, num_kept, attention):
        read.append(attention)
        kept = attention.topk(num_kept, dim=-1).indices.sort(dim=-1).values
        return kept, gather_tokens(features, kept)

    last_layer = f"{vlm.num_layers}:image:0.9"
    for schedule, longer_schedule in ((None, last_layer), ("1:image:0.5", f"1:image:0.5,{last_layer}")):
        apply_patch_selection(model, longer_schedule)
        with record_patch_selection(model) as recorded:
            model(**inputs)
        apply_patch_selection(model, schedule, visual_tokens=3, scorer=keep_attended)
        model(**inputs)
        in_order = recorded[-2].candidate_indices.argsort(dim=1)  # windows have an order of their own
        assert_close(read[-1], recorded[-2].scores.gather(1, in_order))


def test_tokens_of_a_scorer_keep_their_order():
    """A scorer may return the best tokens first, but not another number of them."""
    model, inputs = make_both("llava", [1, 2])

    def keep_longest(features, prompt, prompt_mask, num_kept):
        kept = features.norm(dim=-1).topk(num_kept, dim=-1).indices
        return kept, gather_tokens(features, kept)

    def keep_longest_in_order(features, *others):
        kept = keep_longest(features, *others)[0].sort(dim=-1).values
        return kept, gather_tokens(features, kept)

    def keep_too_few(features, prompt, prompt_mask, num_kept):
        return keep_longest(features, prompt, prompt_mask, num_kept - 1)

    def keep_one_twice(features, *others):
        kept, kept_features = keep_longest(features, *others)
        return torch.cat((kept[:, :1], kept[:, :-1]), dim=1), kept_features

    def keep_beyond_the_end(features, *others):
        kept, kept_features = keep_longest(features, *others)
        return kept + features.shape[1], kept_features

    pruned = prune_inputs(model, inputs, 5, scorer=keep_longest)
    expected = prune_inputs(model, inputs, 5, scorer=keep_longest_in_order)
    assert torch.equal(model(**pruned).logits, model(**expected).logits)
    for wrong in (keep_too_few, keep_one_twice, keep_beyond_the_end):
        with pytest.raises(ValueError, match="positions"):
            prune_inputs(model, inputs, 5, scorer=wrong)


def test_attention_that_a_tower_does_not_have_is_refused():
    model, inputs = make_both("llava_next", [1])
    with pytest.raises(TypeError, match="attention"):
        prune_inputs(model, inputs, visual_tokens=4, scorer="vispruner")
    with pytest.raises(TypeError, match="attention"):
        apply_patch_selection(model, visual_tokens=4, scorer="vispruner")


def test_the_number_counts_per_tile():
    model, inputs = make_both("smolvlm", [1, 2])  # of two tiles each, with 16 tokens
    pruned = prune_inputs(model, inputs, visual_tokens=6)
    assert (pruned["input_ids"] == IMAGE).sum(dim=1).tolist() == [2 * 6, 4 * 6]
    with pytest.raises(ValueError, match="visual_tokens"):
        prune_inputs(model, inputs, visual_tokens=17)


def test_empty_prompt():
    model = BY_NAME["llava"].make()
    inputs = {"input_ids": torch.full((1, 64), IMAGE), "pixel_values": torch.randn(1, 3, 32, 32)}
    apply_patch_selection(model, "1:text:0.5", visual_tokens=5, guide=TextGuide.for_model(model))
    logits = model(**inputs).logits
    assert logits.shape[1] == 5
    assert logits.isfinite().all()


@grid_and_packed
def test_inputs_embeds_match_input_ids(vlm):
    model = vlm.make()
    inputs = make_inputs(vlm, [1, 2])
    apply_patch_selection(model, "1:image:0.5", visual_tokens=7)
    expected = model(**inputs).logits
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert_close(model(**inputs).logits, expected, **TOLERANCE)


def test_labels_may_cover_prompts_that_are_not_read():
    model, inputs = make_both("llava", [1, 0])
    inputs["labels"] = inputs["input_ids"].clone()
    for scorer in ("divprune", "random", "pooling"):
        pruned = prune_inputs(model, inputs, 4, scorer=scorer)
        assert pruned["labels"].shape[1] == inputs["labels"].shape[1] - 60
    for scorer in ("prompt", keep_even):
        with pytest.raises(ValueError, match="labels"):
            prune_inputs(model, inputs, 4, scorer=scorer)
    inputs["labels"][0, :-2] = -100  # the second row has no image
    pruned = prune_inputs(model, inputs, 4)
    assert (pruned["input_ids"] == IMAGE).sum() == 4


@grid_and_packed
@pytest.mark.parametrize("schedule", ["1:text:0.5", "unpruned"])
def test_placeholders_that_do_not_match_raise(vlm, schedule):
    model = vlm.make()
    inputs = make_inputs(vlm, [1, 1])
    guide = TextGuide.for_model(model) if "text" in schedule else None
    apply_patch_selection(model, schedule, visual_tokens=5, guide=guide)
    expected = model(**inputs).logits
    ids = inputs["input_ids"]
    is_image = ids[0] == IMAGE
    fewer = ids.clone()
    fewer[0, is_image.nonzero()[0]] = 7
    none = ids.clone()
    none[0, is_image] = 7
    moved = fewer.clone()
    moved[1, -1] = IMAGE
    for faulty in (fewer, none, moved, ids[:0]):
        with pytest.raises(ValueError, match="input_ids"):
            model(**{**inputs, "input_ids": faulty})
    with pytest.raises(ValueError, match="pixel_values"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:0]})
    assert torch.equal(model(**inputs).logits, expected)


with_videos = pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])


@with_videos
def test_videos_at_a_rate_of_one_change_nothing(name):
    vlm = BY_NAME[name]
    model = vlm.make()
    inputs = make_video_inputs(vlm)
    without_image = {name: value for name, value in inputs.items() if name not in ENCODER_INPUTS}
    without_image["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 16)
    without_image["mm_token_type_ids"] = 2 * (inputs["input_ids"] == VIDEO).long()
    for given in (inputs, without_image):
        expected = model(**given).logits
        sequences = model.generate(**given, max_new_tokens=4, do_sample=False)
        for options in ({"keep_rate": 1.0}, {"keep_rate": 1.0, "scorer": "evs"}):
            apply_patch_selection(model, **options)
            assert torch.equal(model(**given).logits, expected)
            assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), sequences)
            remove_patch_selection(model)


@with_videos
def test_a_rate_is_of_each_time_step(name):
    """The logits are those of the same tokens dropped by hand."""
    vlm = BY_NAME[name]
    model = vlm.make()
    base = model.model
    inputs = make_video_inputs(vlm)
    pruned = prune_inputs(model, inputs, keep_rate=0.5, scorer=keep_even)
    assert (pruned["input_ids"] == VIDEO).sum() == 3 * 4
    logits = model(**pruned).logits
    ids = inputs["input_ids"]
    stays = (ids[0] != IMAGE) & (ids[0] != VIDEO)
    for token in (IMAGE, VIDEO):
        stays[(ids[0] == token).nonzero()[::2, 0]] = True  # all numbers of tokens are even
    image = base.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    video = base.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True)
    features = torch.cat([image.pooler_output[0][::2], video.pooler_output[0][::2]])
    layers = zip(image.get("deepstack_features") or (), video.get("deepstack_features") or ())
    deepstack = [torch.cat([ours[0][::2], theirs[0][::2]]) for ours, theirs in layers]
    assert_close(logits, logits_of_rest(model, inputs, stays, features, deepstack), **TOLERANCE)


def test_evs_keeps_the_first_step_and_what_changes():
    vlm = BY_NAME["qwen2_vl"]
    model = vlm.make()
    inputs = make_video_inputs(vlm)
    unpruned = (inputs["input_ids"] == IMAGE).sum()
    pruned = prune_inputs(model, inputs, keep_rate=0.5, scorer="evs")
    assert (pruned["input_ids"] == IMAGE).sum() == unpruned
    assert (pruned["input_ids"] == VIDEO).sum() == 12
    apply_patch_selection(model, keep_rate=0.5, scorer="evs")
    with record_patch_selection(model) as recorded:
        model(**inputs)
    _, *steps = recorded[-1].kept_indices
    assert steps[0][:8].tolist() == [*range(8)]
    logits = model(**inputs).logits
    for options in ({"keep_rate": 0.1}, {"keep_rate": 0.5, "scorer": "vispruner"}):
        apply_patch_selection(model, **options)
        with pytest.raises(ValueError, match="video"):
            model(**inputs)
    empty = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:0]}
    with pytest.raises(ValueError, match="pixel_values_videos"):
        model(**empty)
    with pytest.raises(ValueError, match="keep_rate"):
        apply_patch_selection(model, visual_tokens=5, scorer="evs")
    apply_patch_selection(model, keep_rate=0.5, scorer="evs")
    assert torch.equal(model(**inputs).logits, logits)


def test_bad_inputs_raise():
    model, inputs = make_both("llava")
    with pytest.raises(ValueError, match="visual_tokens"):
        prune_inputs(model, inputs, visual_tokens=65)
    with pytest.raises(ValueError, match="keep_rate"):
        prune_inputs(model, inputs)
    with pytest.raises(ValueError, match="scorer"):
        apply_patch_selection(model, "1:image:0.5", scorer="prompt")
    for schedule in (0.5, False, ["1:image:0.5"]):
        with pytest.raises(TypeError):
            apply_patch_selection(model, schedule)
    with pytest.raises(ValueError, match="schedule"):
        apply_patch_selection(model, "", keep_rate=0.5)
    apply_patch_selection(model, "1:image:0.5")
    cache = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)[CACHE_NAME]
    for name in {CACHE_NAME, "past_key_values"}:
        with pytest.raises(ValueError, match="conversation"):
            model.generate(**inputs, max_new_tokens=2, **{name: cache})
