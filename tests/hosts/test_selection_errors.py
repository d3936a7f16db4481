"""Errors of `apply_patch_selection` and `record_patch_selection`."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from schedules import schedule_of
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
def test_unsupported_model_raises_with_the_supported_ones(make_model):
    model = make_model()
    with pytest.raises(TypeError) as error:
        apply_patch_selection(model, schedule_of([1]))
    assert type(model).__name__ in str(error.value)
    for name in (
        "Vilt",
        "BlipForQuestionAnswering",
        "BridgeTowerModel",
        "CLIPModel",
        "LlavaModel",
        "SiglipModel",
        "timm",
    ):
        assert name in str(error.value)


@pytest.mark.parametrize("schedule", ["2:image,4:image", "1:image:0.5:0.9"])
def test_bad_schedule_raises_and_leaves_the_model_unchanged(schedule):
    host = HOSTS["clip"]
    model = host.make_model()
    host.apply(model)
    expected = host.run(model)
    with pytest.raises(ValueError):
        apply_patch_selection(model, schedule)
    assert torch.equal(host.run(model), expected)


def test_bridgetower_rejects_layers_after_its_first_bridge():
    apply_patch_selection(make_bridgetower(), "1:image:0.5,2:image:0.5")
    with pytest.raises(ValueError, match="3"):
        apply_patch_selection(make_bridgetower(), "1:image:0.5,3:image:0.5")


@pytest.mark.parametrize(
    "make_model",
    [lambda: make_blip(BlipForConditionalGeneration), make_bridgetower, lambda: make_clip(hidden_size=16), make_timm],
)
def test_unsupported_text_guidance_raises(make_model):
    model = make_model()
    apply_patch_selection(model, "1:image:0.5,2:image:0.5")
    with pytest.raises(ValueError, match="text"):
        apply_patch_selection(model, "1:image:0.5,2:text:0.5")


def test_options_of_generative_models_raise_for_other_models():
    with pytest.raises(ValueError, match="visual_tokens"):
        apply_patch_selection(make_clip(), "1:image:0.5", visual_tokens=4)
    with pytest.raises(ValueError, match="random"):
        apply_patch_selection(make_clip(), "1:random:0.5")


def test_text_embeds_of_wrong_shape_raise():
    model = HOSTS["clip"].make_model()
    apply_patch_selection(model, schedule_of(LAYERS, RATE, "text"))
    for shape in [(3, 16), (2, 32), (3, 5, 32)]:
        with pytest.raises(ValueError, match=r"must have shape \(3, 32\)"):
            model.get_image_features(PIXELS, text_embeds=torch.zeros(shape))
    apply_patch_selection(model, schedule_of(LAYERS, RATE, "image"))
    with pytest.raises(ValueError, match="text_embeds"):
        model.get_image_features(PIXELS, text_embeds=torch.zeros(3, 32))


def test_unsupported_layers_raise():
    with pytest.raises(TypeError, match="Layer 1 .*Block.*ParallelScalingBlock"):
        apply_patch_selection(make_timm(block_fn=ParallelScalingBlock), schedule_of(LAYERS, RATE, "image"))
    with pytest.raises(TypeError, match="DiffAttention"):
        apply_patch_selection(make_timm(attn_layer="diff"), schedule_of(LAYERS, RATE, "image"))
    model = make_timm()
    apply_patch_selection(model, schedule_of(LAYERS, RATE, "image"))
    with pytest.raises(ValueError, match="attn_mask"):
        model(PIXELS, attn_mask=torch.ones(17, 17, dtype=torch.bool))


def test_compiled_or_hooked_layers_raise():
    model = HOSTS["clip"].make_model()
    add_hook_to_module(model.vision_model.encoder.layers[0], ModelHook())
    with pytest.raises(ValueError, match="layer 1 .*forward"):
        HOSTS["clip"].apply(model)
    model = HOSTS["clip"].make_model()
    model.vision_model.encoder.layers[1].compile()
    with pytest.raises(ValueError, match="layer 2 .*_compiled_call_impl"):
        HOSTS["clip"].apply(model)
    model = HOSTS["clip"].make_model()
    HOSTS["clip"].apply(model)
    add_hook_to_module(model.vision_model.encoder.layers[0], ModelHook())
    with pytest.raises(ValueError, match="hook of Accelerate"):
        remove_patch_selection(model)


def test_recording_nothing_raises():
    model = HOSTS["clip"].make_model()
    with pytest.raises(ValueError, match="no selection layers"):
        with record_patch_selection(model):
            pass
    HOSTS["clip"].apply(model)
    with pytest.raises(RuntimeError, match="Nothing was recorded"):
        with record_patch_selection(model):
            pass
