"""Calls of patched generative models: generation, threads, copies, recordings, removal, and refused models."""

import copy
import pickle
import threading

import accelerate
import PIL.Image
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny_vlm_processors import conversation, make_llava_processor
from tiny_vlms import BY_NAME, ENCODER_INPUTS, OTHERS, families, grid_and_packed, make_inputs
from torch import nn
from transformers import GenerationConfig, Trainer, TrainingArguments, pipeline

from modeling_trips.hosts import (
    TextGuide,
    apply_patch_selection,
    prune_inputs,
    record_patch_selection,
    remove_patch_selection,
)
from modeling_trips.modeling_trips_text import CACHE_NAME


GUIDE_OF_LAYER_2 = TextGuide(32, 4, 8, layer=2)


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


@grid_and_packed
@torch.no_grad()
def test_other_methods_of_patched_models_do_not_select(vlm):
    model, inputs = vlm.make(), make_inputs(vlm, [1, 2])
    encoder = {name: inputs[name] for name in ENCODER_INPUTS if name in inputs}
    features = model.get_image_features(**encoder, return_dict=True).pooler_output
    pruned = prune_inputs(model, inputs, visual_tokens=4)
    apply_patch_selection(model, "1:image:0.3")
    model(**inputs)
    for own, expected in zip(model.get_image_features(**encoder, return_dict=True).pooler_output, features):
        assert torch.equal(own, expected)
    assert torch.equal(prune_inputs(model, inputs, visual_tokens=4)["input_ids"], pruned["input_ids"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model.compile(backend="eager") or model,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: add_hook_to_module(model, ModelHook()),
    ],
    ids=["compiled in place", "compiled", "hooked"],
)
@pytest.mark.parametrize("schedule", ["unpruned", "1:image:0.5"])
def test_replaced_forward_passes_raise(wrap, schedule):
    with pytest.raises(ValueError):
        apply_patch_selection(wrap(BY_NAME["llava"].make()), schedule, visual_tokens=5)


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("3:image:0.5", {}),  # LLaVA uses the states of the layer before the last one
        ("1:image:0.5:0.9", {}),
        ("1:text:0.5", {}),
        ("1:image:0.5", {"visual_tokens": 0}),
        ("1:image:0.5", {"keep_rate": 0.0}),
        ("1:image:0.5", {"keep_rate": 1.5}),
        ("1:image:0.5", {"keep_rate": 0.5, "visual_tokens": 9}),
        ("1:image:0.5", {"scorer": "words"}),
        ("1:image:0.5", {"guide": TextGuide(32, 4, 8)}),
        ("1:text:0.5,2:text:0.5", {"guide": TextGuide(32, 4, 8)}),
        *(("1:text:0.5", {"guide": guide}) for guide in (TextGuide(32, 2, 8), TextGuide(64, 4, 8), GUIDE_OF_LAYER_2)),
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
    assert all(map(torch.equal, logits, expected))


@grid_and_packed
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
@grid_and_packed
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
def test_selection_cannot_change_while_it_is_recorded():
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    apply_patch_selection(model, "1:image:0.3", visual_tokens=5)
    with record_patch_selection(model) as recorded:
        with pytest.raises(RuntimeError):
            apply_patch_selection(model, "2:image:0.3")
        with pytest.raises(RuntimeError):
            remove_patch_selection(model)
        with record_patch_selection(model) as inner:
            model(**inputs)
        model(**inputs)
    assert len(inner) == 2 and len(recorded) == 4


@grid_and_packed
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
    model.generation_config.max_length = length
    for options in ({}, {"max_length": length}, {"generation_config": config}):
        assert model.generate(**inputs, **options).shape[1] == length
    assert config.max_length == model.generation_config.max_length == length
    with pytest.raises(ValueError):
        model.generate(**inputs, max_length=3)
    assert model.generate(**inputs, max_length=3, max_new_tokens=2).shape[1] == length - 1


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


@torch.no_grad()
def test_selection_at_the_exit_needs_no_schedule():
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    expected = model(**prune_inputs(model, inputs, visual_tokens=8)).logits
    apply_patch_selection(model, visual_tokens=8)
    assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(ValueError, match="schedule"):
        apply_patch_selection(model)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_a_rate_keeps_a_share_of_each_image(name):
    vlm = BY_NAME[name]
    model, inputs = vlm.make(), make_inputs(vlm, [1, 1, 1])  # of 32, 64 and 16 visual tokens
    pruned = prune_inputs(model, inputs, keep_rate=0.25)
    expected = model(**pruned).logits
    apply_patch_selection(model, keep_rate=0.25)
    for patched in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with record_patch_selection(patched) as recorded:
            logits = patched(**inputs).logits
        assert torch.equal(logits, expected)
        assert (recorded[0].kept_indices >= 0).sum(dim=1).tolist() == [8, 16, 4]


@torch.no_grad()
def test_a_rate_is_of_the_image_and_not_of_what_the_tower_keeps():
    vlm = BY_NAME["llava"]
    model, inputs = vlm.make(), make_inputs(vlm, [1])
    for keep_rate, number in ((0.25, 16), (0.75, 32)):  # the tower keeps 32 of 64
        apply_patch_selection(model, "1:image:0.5", keep_rate=keep_rate)
        with record_patch_selection(model) as recorded:
            model(**inputs)
        assert recorded[-1].kept_indices.shape == (1, number)


@pytest.mark.parametrize("visual_tokens", [4, 60])
def test_pooling_that_has_no_grid_is_refused_when_it_is_applied(visual_tokens):
    model, inputs = BY_NAME["llava"].make(), make_inputs(BY_NAME["llava"], [1])
    schedule = "2:image:0.25" if visual_tokens == 4 else "unpruned"  # the patches kept by the tower; 4 x 15 cells
    with pytest.raises(ValueError, match="[Pp]ool|cells"):
        apply_patch_selection(model, schedule, visual_tokens=visual_tokens, scorer="pooling")
    apply_patch_selection(model, "unpruned", visual_tokens=4, scorer="pooling")
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] - 60


@torch.no_grad()
def test_a_part_of_a_patched_model_is_refused():
    model, inputs = BY_NAME["llava"].make(), make_inputs(BY_NAME["llava"], [1])
    apply_patch_selection(model, "2:image:0.5")
    expected = model(**inputs).logits
    for part in (model.model, model.model.vision_tower):
        with pytest.raises(ValueError, match="whole model"):
            remove_patch_selection(part)
        with pytest.raises(ValueError, match="whole model"):
            apply_patch_selection(part, "1:image:0.5")
    assert torch.equal(model(**inputs).logits, expected)


def test_the_pipeline_takes_chat_messages():
    model, processor = BY_NAME["llava"].make(), make_llava_processor()
    processor.tokenizer.padding_side = "left"
    image = PIL.Image.new("RGB", (40, 30), "red")
    messages = [conversation(text, image) for text in ("what is it ?", "red ?")]
    apply_patch_selection(model, "1:image:0.5", visual_tokens=8)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"max_new_tokens": 4, "do_sample": False}
    results = pipe(messages, return_full_text=False, batch_size=2, generate_kwargs=options)
    for result, message in zip(results, messages):
        inputs = processor.apply_chat_template(
            message, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        sequence = model.generate(**inputs, **options)
        new = processor.batch_decode(sequence[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert result[0]["generated_text"].strip() == new[0].strip() != ""


def test_trainer_trains_and_evaluates(tmp_path):
    vlm = BY_NAME["llava"]
    model = vlm.make()
    rows = []
    for seed in range(4):
        row = {name: value[0] for name, value in make_inputs(vlm, [1], seed=seed).items()}
        row["labels"] = row["input_ids"].masked_fill(torch.arange(len(row["input_ids"])) < 70, -100)
        rows.append(row)
    apply_patch_selection(model, "1:image:0.5", visual_tokens=8)
    arguments = TrainingArguments(
        tmp_path, max_steps=8, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        prediction_loss_only=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    trainer.save_model(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved").eval()
    remove_patch_selection(model)
    inputs = make_inputs(vlm)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)


def test_guides_move_to_the_device_of_the_model():
    guide = TextGuide(32, 4, 8)
    apply_patch_selection(BY_NAME["llava"].make().to("meta"), "1:text:0.3", guide=guide)
    assert guide.query.weight.device.type == "meta"
