"""Tests of calls of patched vision-language models: threads, checkpointing, copies, recordings, decoding by hand."""

import copy
import pickle
import threading

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny_vlms import BY_NAME, IMAGE, OTHERS, VLMS, Vlm, make_inputs
from torch import nn
from transformers import GenerationConfig

from modeling_trips.hosts import (
    TextGuide,
    apply_patch_selection,
    prune_inputs,
    record_patch_selection,
    remove_patch_selection,
)
from modeling_trips.hosts.vlm.wrapper import selection_of
from modeling_trips.modeling_trips_base import CACHE_NAME


ENCODER_INPUTS = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images")
families = pytest.mark.parametrize("vlm", VLMS, ids=lambda vlm: vlm.name)


def features_of(model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    encoder = {name: inputs[name] for name in ENCODER_INPUTS if name in inputs}
    return [*model.get_image_features(**encoder, return_dict=True).pooler_output]


def assert_equal_lists(some: list[torch.Tensor], others: list[torch.Tensor]):
    assert len(some) == len(others) and all(torch.equal(one, other) for one, other in zip(some, others))


# ---- One pass of the tower per call --------------------------------------------------------------------------------


@families
@torch.no_grad()
def test_other_methods_of_patched_models_do_not_select(vlm):
    model, inputs = vlm.make(), make_inputs(vlm, [1, 2])
    features, pruned = features_of(model, inputs), prune_inputs(model, inputs, visual_tokens=4)
    apply_patch_selection(model, "1:image:0.3")
    model(**inputs)
    assert_equal_lists(features_of(model, inputs), features)
    assert torch.equal(prune_inputs(model, inputs, visual_tokens=4)["input_ids"], pruned["input_ids"])


@pytest.mark.parametrize("name", ["llava", "smolvlm", "qwen2_5_vl"])
def test_threads_do_not_mix(name):
    vlm = BY_NAME[name]
    model = vlm.make()
    apply_patch_selection(model, "1:text:0.3", visual_tokens=5, guide=TextGuide.for_model(model))
    inputs = [make_inputs(vlm, [1 + seed], seed=seed) for seed in range(2)]
    with torch.no_grad():
        expected = [model(**own).logits for own in inputs]
    logits: list = [None, None]
    barrier = threading.Barrier(2, timeout=30)
    part = next(part for part in model.modules() if "EncoderLayer" in type(part).__name__ or hasattr(part, "attn"))

    def call(number: int):
        with torch.no_grad():
            logits[number] = model(**inputs[number]).logits

    def wait(module: nn.Module, args: tuple):
        barrier.wait()

    # Both threads are in the tower when its first layer selects.
    hook = part.register_forward_pre_hook(wait)
    threads = [threading.Thread(target=call, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert_equal_lists(logits, expected)


@families
def test_checkpointing_recomputes_each_forward_pass(vlm):
    """The gradient of a difference of two losses, with and without activation checkpointing."""
    gradients = []
    for checkpoints in (False, True):
        model = vlm.make().train()
        apply_patch_selection(model, "1:image:0.5,2:text:0.6", guide=TextGuide.for_model(model))
        if checkpoints:
            model.gradient_checkpointing_enable()
        losses = []
        for seed, counts in enumerate(([1], [2])):
            inputs = make_inputs(vlm, counts, "right", seed)
            labels = inputs["input_ids"].clone()
            labels[:, :-2] = -100
            losses.append(model(**inputs, labels=labels).loss)
        (losses[0] - losses[1]).backward()
        lowest = [value for name, value in model.named_parameters() if "vis" in name and ".0.mlp." in name]
        assert lowest and all(value.grad.abs().sum() > 0 for value in lowest)
        own = [value.grad.flatten() for value in model.parameters() if value.grad is not None]
        gradients.append(torch.cat(own))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@families
@torch.no_grad()
def test_copies_select_by_themselves(vlm, make_copy):
    model, inputs, other = vlm.make(), make_inputs(vlm, [1, 1]), make_inputs(vlm, [1, 2], seed=5)
    apply_patch_selection(model, "1:image:0.3", visual_tokens=6)
    copied = make_copy(model)  # Transformers adds hooks that pickle refuses when a call returns hidden states
    unpruned, expected = vlm.make()(**other).logits, model(**other).logits
    model(**inputs)
    assert torch.equal(copied(**other).logits, expected)
    remove_patch_selection(copied)
    assert torch.equal(copied(**other).logits, unpruned) and torch.equal(model(**other).logits, expected)


@torch.no_grad()
def test_refused_calls_leave_nothing_behind():
    vlm = BY_NAME["qwen2_vl"]
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    features = features_of(model, inputs)
    apply_patch_selection(model, "1:text:0.3", guide=TextGuide.for_model(model))
    with pytest.raises(ValueError):
        model(**{**inputs, "input_ids": inputs["input_ids"][:, :-20], "attention_mask": None})
    assert_equal_lists(features_of(model, inputs), features)


# ---- Recordings ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_selection_cannot_change_while_it_is_recorded():
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    apply_patch_selection(model, "1:image:0.3", visual_tokens=5)
    with record_patch_selection(model) as recorded:
        with pytest.raises(RuntimeError):
            apply_patch_selection(model, "2:image:0.3")
        with pytest.raises(RuntimeError):
            remove_patch_selection(model)
        model(**inputs)
    assert len(recorded) == 2


# ---- Decoding ------------------------------------------------------------------------------------------------------


@families
@torch.no_grad()
def test_decoding_by_hand(vlm):
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    model(**make_inputs(vlm, [2, 1]))  # an earlier call without selection
    apply_patch_selection(model, "1:image:0.5", visual_tokens=6)
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    outputs = model.generate(**inputs, **options, output_logits=True)
    new, cache = outputs.sequences[:, -2:-1], model(**inputs, use_cache=True)[CACHE_NAME]
    mask = inputs["attention_mask"].new_ones(1, inputs["attention_mask"].shape[1] + 1)
    with pytest.raises(ValueError, match="attention_mask"):  # of the caller's prompt instead of the shorter one
        model(input_ids=new, attention_mask=mask, **{CACHE_NAME: cache})
    logits = model(input_ids=new, **{CACHE_NAME: cache}).logits[:, -1]
    torch.testing.assert_close(logits, outputs.logits[1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_lengths_count_the_prompt_of_the_caller():
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    model.generation_config.eos_token_id = None
    apply_patch_selection(model, "unpruned", visual_tokens=5)
    length = inputs["input_ids"].shape[1] + 3
    config = GenerationConfig(max_length=length, pad_token_id=1)
    assert model.generate(**inputs, generation_config=config).shape[1] == length
    assert config.max_length == length
    assert model.generate(**inputs, max_length=length).shape[1] == length
    model.generation_config.max_length = length
    assert model.generate(**inputs).shape[1] == length
    assert model.generation_config.max_length == length
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == length - 1


# ---- Models whose forward pass is not their own --------------------------------------------------------------------


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def hooked(model: nn.Module) -> nn.Module:
    return add_hook_to_module(model, ModelHook())


@pytest.mark.parametrize("wrap", [compiled, compiled_in_place, hooked])
@pytest.mark.parametrize("schedule", ["unpruned", "1:image:0.5"])
def test_replaced_forward_passes_raise(wrap, schedule):
    with pytest.raises(ValueError):
        apply_patch_selection(wrap(BY_NAME["llava"].make()), schedule, visual_tokens=5)


@torch.no_grad()
def test_accelerate_dispatches_patched_models(tmp_path):
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm, [1, 2])
    apply_patch_selection(model, "1:image:0.5", visual_tokens=5)
    expected = model(**inputs).logits
    accelerate.disk_offload(model, tmp_path)
    torch.testing.assert_close(model(**inputs).logits, expected)
    remove_patch_selection(model)
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_models_in_peft_are_named():
    peft = pytest.importorskip("peft")
    vlm = BY_NAME["llava"]
    model, inputs = peft.get_peft_model(vlm.make(), peft.LoraConfig(target_modules=["q_proj"])), make_inputs(vlm, [1])
    with pytest.raises(TypeError, match="get_base_model"):
        apply_patch_selection(model, "1:image:0.5")
    apply_patch_selection(model.get_base_model(), "unpruned", visual_tokens=5)
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] - vlm.tokens + 5


# ---- Models and towers that are not supported ----------------------------------------------------------------------


@pytest.mark.parametrize("vlm", OTHERS, ids=lambda vlm: vlm.name)
@torch.no_grad()
def test_other_towers_do_not_select(vlm):
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    with pytest.raises(TypeError, match="tower"):
        apply_patch_selection(model, "1:image:0.5")
    with pytest.raises(TypeError):
        TextGuide.for_model(model)
    apply_patch_selection(model, "unpruned", visual_tokens=4)
    with record_patch_selection(model) as recorded:
        model(**inputs)
    assert recorded[0].kept_indices.shape == (1, 4)


def test_other_spatial_positions_raise():
    config = transformers.Qwen2_5OmniThinkerConfig()
    with torch.device("meta"):
        model = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    with pytest.raises(TypeError, match="get_rope_index"):
        apply_patch_selection(model, "unpruned", visual_tokens=4)


# ---- Padding patches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
@pytest.mark.parametrize("guidance", ["image", "random"])
@pytest.mark.parametrize(("keep_rates", "num_real"), [((0.4,), 7), ((0.8,), 8), ((0.8, 0.5), 7)])
def test_padding_patches_come_last_and_change_nothing(name, guidance, keep_rates, num_real):
    vlm = BY_NAME[name]
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    mask = torch.ones(1, 2, 32, 32, dtype=torch.bool)
    mask[:, 1, :, 16:] = False  # the right half of the second tile, 8 of its 16 units
    inputs["pixel_attention_mask"] = mask
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][:, 1, :, :, 16:] = 3.0
    schedule = ",".join(f"{layer}:{guidance}:{rate}" for layer, rate in enumerate(keep_rates, start=1))
    apply_patch_selection(model, schedule)
    is_real = torch.arange(16) % 4 < 2
    features = []
    for own in (inputs, other):
        with torch.no_grad(), record_patch_selection(model) as recorded:
            encoded = selection_of(model).prune(own)["mm_encoder_outputs"]["image"].pooler_output[0]
        assert is_real[recorded[-2].kept_indices[1]].sum() == num_real
        kept = recorded[-1].kept_indices[0]
        features.append(encoded[(kept < 16) | is_real[kept % 16]])
    torch.testing.assert_close(*features, atol=1e-5, rtol=0)


def padded_anyres(vlm: Vlm) -> dict:
    """An image of 16 x 64 pixels: padding is the upper and the lower quarter of both of its tiles."""
    inputs = make_inputs(vlm, [1])
    inputs["image_sizes"] = torch.tensor([[16, 64]])
    dropped = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0][-4 * 17 :]
    stays = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool).index_fill(0, dropped, False)
    return {name: value[:, stays] if value.shape[:2] == (1, len(stays)) else value for name, value in inputs.items()}


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("guidance", ["image", "random"])
@pytest.mark.parametrize(("keep_rates", "num_real"), [((0.4,), 26), ((0.8,), 32), ((0.8, 0.5), 26)])
def test_padding_of_tiles_comes_last(name, guidance, keep_rates, num_real):
    vlm = BY_NAME[name]
    model = vlm.make()
    schedule = ",".join(f"{layer}:{guidance}:{rate}" for layer, rate in enumerate(keep_rates, start=1))
    apply_patch_selection(model, schedule)
    with torch.inference_mode(), record_patch_selection(model) as recorded:
        logits = model(**padded_anyres(vlm)).logits
    is_real = (torch.arange(64) // 8 >= 2) & (torch.arange(64) // 8 < 6)
    assert [int(is_real[kept].sum()) for kept in recorded[-2].kept_indices[1:]] == [num_real] * 2
    assert logits.isfinite().all()


@torch.no_grad()
def test_recordings_nest():
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    apply_patch_selection(model, "1:image:0.3", visual_tokens=5)
    with record_patch_selection(model) as outer:
        with record_patch_selection(model) as inner:
            model(**inputs)
        model(**inputs)
    assert len(inner) == 2 and len(outer) == 4
