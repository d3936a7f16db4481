"""What `apply_patch_selection` and `record_patch_selection` refuse, and in which words."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from timm.models.vision_transformer import ParallelScalingBlock
from tiny_hosts import HOSTS, LAYERS, PIXELS, RATE, make_blip, make_bridgetower, make_clip, make_timm
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BlipForConditionalGeneration,
    CLIPForImageClassification,
)

from modeling_trips.hosts.apply import apply_patch_selection, record_patch_selection, remove_patch_selection


@pytest.mark.parametrize(
    "make_model",
    [
        lambda: BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)),
        lambda: make_clip(CLIPForImageClassification),
        lambda: nn.Linear(2, 2),
    ],
)
def test_a_model_that_is_not_supported_gets_the_list_of_those_that_are(make_model):
    model = make_model()
    with pytest.raises(TypeError) as error:
        apply_patch_selection(model, [1])
    assert f"does not support {type(model).__name__}" in str(error.value)
    for name in (
        "ViltModel and all of its heads",
        "BlipForQuestionAnswering",
        "BridgeTowerModel",
        "CLIPModel",
        "SiglipModel",
        "timm",
    ):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("layers", "rate", "message"),
    [
        ([0], 0.7, r"lie in 1\.\.3, got \[0\]"),
        ([2, 4], 0.7, r"lie in 1\.\.3, got \[2, 4\]"),
        ([2, 1], 0.7, "ascending"),
        ([1, 1], 0.7, "without repetition"),
        ([1, 2], [0.7], "`keep_rate` must be one for all or one per selection layer: got"),
        ([1, 2], [0.7, 0.0], r"\(0, 1\], got \[0.7, 0.0\]"),
        ([1], 1.5, r"\(0, 1\], got 1.5"),
        (2, 0.7, "`selection_layers` must be a list of integers, got 2"),
        ([2.0], 0.7, r"`selection_layers` must be a list of integers, got \[2.0\]"),
        ("2", 0.7, "`selection_layers` must be a list of integers, got '2'"),
        ([1], "x", r"`keep_rate` must lie in \(0, 1\], got 'x'"),
        ([1], None, r"`keep_rate` must lie in \(0, 1\], got None"),
        ([1, 2], [0.7, "x"], r"`keep_rate` must lie in \(0, 1\], got \[0.7, 'x'\]"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_and_changes_nothing(layers, rate, message):
    host = HOSTS["clip"]
    model = host.make_model()
    host.apply(model)
    expected = host.run(model)
    with pytest.raises(ValueError, match=message):
        apply_patch_selection(model, layers, rate, "image")
    assert torch.equal(host.run(model), expected)


def test_bridgetower_cannot_select_behind_its_first_bridge():
    with pytest.raises(ValueError, match=r"lie in 1\.\.2, got \[1, 3\]. Layers 3 on are tied"):
        apply_patch_selection(make_bridgetower(), [1, 3], RATE, "image")


@pytest.mark.parametrize(
    ("make_model", "reason"),
    [
        (lambda: make_blip(BlipForConditionalGeneration), "causal decoder"),
        (make_bridgetower, "nothing but image tokens"),
        (lambda: make_clip(hidden_size=16), "text is 16 wide and its vision tower 32"),
        (make_timm, "takes pixels only"),
    ],
)
def test_where_the_text_cannot_guide_an_error_says_why(make_model, reason):
    model = make_model()
    with pytest.raises(ValueError, match=f'{reason}.*guidance="image"'):
        apply_patch_selection(model, LAYERS)
    with pytest.raises(ValueError, match='must be "text" or "image", or a list of them, got \'words\''):
        apply_patch_selection(model, LAYERS, guidance="words")


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (["text"], r"`guidance` must be one for all or one per selection layer: got \['text'\] for \[1, 2\]"),
        (["image", "random"], r'must be "text" or "image", or a list of them, got \[.image., .random.\]'),
    ],
)
def test_guidance_per_layer_must_fit_the_layers(guidance, message):
    with pytest.raises(ValueError, match=message):
        apply_patch_selection(make_clip(), LAYERS, guidance=guidance)


def test_one_layer_that_a_text_should_guide_is_enough_for_an_error():
    with pytest.raises(ValueError, match='takes pixels only. Use guidance="image"'):
        apply_patch_selection(make_timm(), LAYERS, guidance=["image", "text"])


def test_a_text_that_does_not_fit_is_refused():
    model = HOSTS["clip"].make_model()
    apply_patch_selection(model, LAYERS, RATE, "text")
    for shape in [(3, 16), (2, 32), (3, 5, 32)]:
        with pytest.raises(ValueError, match=r"must have shape \(3, 32\)"):
            model.get_image_features(PIXELS, text_embeds=torch.zeros(shape))
    apply_patch_selection(model, LAYERS, RATE, "image")
    with pytest.raises(ValueError, match="applied with guidance='image'"):
        model.get_image_features(PIXELS, text_embeds=torch.zeros(3, 32))


def test_layers_that_selection_does_not_know_are_refused():
    with pytest.raises(TypeError, match="Layer 1 is of class ParallelScalingBlock; patch selection knows Block"):
        apply_patch_selection(make_timm(block_fn=ParallelScalingBlock), LAYERS, RATE, "image")
    with pytest.raises(TypeError, match="has DiffAttention for its attention"):
        apply_patch_selection(make_timm(attn_layer="diff"), LAYERS, RATE, "image")
    model = make_timm()
    apply_patch_selection(model, LAYERS, RATE, "image")
    with pytest.raises(ValueError, match="no `attn_mask`"):
        model(PIXELS, attn_mask=torch.ones(17, 17, dtype=torch.bool))


def test_layers_whose_forward_pass_was_taken_over_are_refused():
    model = HOSTS["clip"].make_model()
    add_hook_to_module(model.vision_model.encoder.layers[0], ModelHook())
    with pytest.raises(ValueError, match="Layer 1 does not run its own code.*forward.*before Accelerate"):
        HOSTS["clip"].apply(model)
    model = HOSTS["clip"].make_model()
    model.vision_model.encoder.layers[1].compile()
    with pytest.raises(ValueError, match="Layer 2 does not run its own code.*_compiled_call_impl"):
        HOSTS["clip"].apply(model)
    model = HOSTS["clip"].make_model()
    HOSTS["clip"].apply(model)
    add_hook_to_module(model.vision_model.encoder.layers[0], ModelHook())
    with pytest.raises(ValueError, match="remove that first"):
        remove_patch_selection(model)


def test_there_must_be_something_to_record():
    model = HOSTS["clip"].make_model()
    with pytest.raises(ValueError, match="no selection layers: call `apply_patch_selection` first"):
        with record_patch_selection(model):
            pass
    HOSTS["clip"].apply(model)
    with pytest.raises(RuntimeError, match="Nothing was recorded"):
        with record_patch_selection(model):
            pass
