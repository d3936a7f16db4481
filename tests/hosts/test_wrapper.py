"""Calls of patched generative models: generation, threads, copies, recordings, removal, and refused models."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from PIL import Image
from tiny_models import gradients_of
from tiny_vlm_processors import conversation, make_llava_processor
from tiny_vlms import BY_NAME, ENCODER_INPUTS, families, grid_and_packed, make_both, make_inputs
from torch import nn
from torch.testing import assert_close
from transformers import GenerationConfig, Trainer, TrainingArguments, pipeline

from modeling_trips.hosts import (
    TextGuide,
    apply_patch_selection,
    prune_inputs,
    record_patch_selection,
    remove_patch_selection,
)
from modeling_trips.modeling_trips_text import CACHE_NAME


pytestmark = pytest.mark.usefixtures("no_grad")


@families
def test_generate_returns_the_callers_prompt(vlm):
    model = vlm.make()
    inputs = make_inputs(vlm, [1, 2])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    pruned = prune_inputs(model, inputs, visual_tokens=6)
    expected = model.generate(**pruned, **options)[:, pruned["input_ids"].shape[1] :]
    apply_patch_selection(model, "unpruned", visual_tokens=6)
    length = inputs["input_ids"].shape[1]
    sequences = model.generate(**inputs, **options)
    assert torch.equal(sequences[:, :length], inputs["input_ids"])
    assert torch.equal(sequences[:, length:], expected)
    sequences = model.generate(**inputs, **options, num_beams=2, num_return_sequences=2)
    assert torch.equal(sequences[::2, :length], inputs["input_ids"])
    text = {name: inputs[name][:, -4:] for name in ("input_ids", "attention_mask")}
    assert model.generate(**text, max_new_tokens=2).shape == (2, 6)


@families
def test_removal_leaves_no_trace(vlm):
    model = vlm.make()
    inputs = make_inputs(vlm, [1, 2])
    model_class = type(model)
    keys = list(model.state_dict())
    expected = model(**inputs).logits
    attributes = set(vars(model))
    hooks = count_hooks(model)
    for schedule in ("1:image:0.5", "2:text:0.5"):
        guide = TextGuide.for_model(model) if "text" in schedule else None
        apply_patch_selection(model, schedule, visual_tokens=5, guide=guide)
        assert model(**inputs).logits.shape[1] < expected.shape[1]
        assert list(model.state_dict()) == keys
        assert type(model).__name__ == model_class.__name__
    remove_patch_selection(model)
    assert type(model) is model_class
    assert set(vars(model)) == attributes
    assert count_hooks(model) == hooks
    assert torch.equal(model(**inputs).logits, expected)


def count_hooks(model):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


@grid_and_packed
def test_other_methods_of_patched_models_do_not_select(vlm):
    model = vlm.make()
    inputs = make_inputs(vlm, [1, 2])
    encoder = {name: inputs[name] for name in ENCODER_INPUTS if name in inputs}
    expected = model.get_image_features(**encoder, return_dict=True).pooler_output
    expected_ids = prune_inputs(model, inputs, visual_tokens=4, scorer="vispruner")["input_ids"]  # reads attention
    apply_patch_selection(model, "1:image:0.3")
    model(**inputs)
    features = model.get_image_features(**encoder, return_dict=True).pooler_output
    assert all(map(torch.equal, features, expected))
    pruned = prune_inputs(model, inputs, visual_tokens=4, scorer="vispruner")
    assert torch.equal(pruned["input_ids"], expected_ids)


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
    model = wrap(BY_NAME["llava"].make())
    with pytest.raises(ValueError):
        apply_patch_selection(model, schedule, visual_tokens=5)


@pytest.mark.parametrize(
    "schedule, options",
    [
        (None, {}),
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
        ("1:text:0.5", {"guide": TextGuide(32, 2, 8)}),
        ("1:text:0.5", {"guide": TextGuide(64, 4, 8)}),
        ("1:text:0.5", {"guide": TextGuide(32, 4, 8, layer=2)}),
    ],
)
def test_bad_schedules_and_options_raise_and_leave_the_model_unchanged(schedule, options):
    model, inputs = make_both("llava")
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
    batches = [make_inputs(vlm, [1]), make_inputs(vlm, [2], seed=1)]

    @torch.no_grad()
    def call(inputs):
        return model(**inputs).logits

    expected = [call(inputs) for inputs in batches]
    barrier = threading.Barrier(2, timeout=30)

    def wait(module, args):
        barrier.wait()

    # Both threads are in the tower when its first layer selects.
    layer = next(part for part in model.modules() if "EncoderLayer" in type(part).__name__ or hasattr(part, "attn"))
    with layer.register_forward_pre_hook(wait), ThreadPoolExecutor(max_workers=2) as threads:
        logits = threads.map(call, batches)
    assert all(map(torch.equal, logits, expected))


@grid_and_packed
@torch.enable_grad()
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
        gradients.append(gradients_of(model))
    lowest = [gradient for name, gradient in gradients[0].items() if "vis" in name and ".0.mlp." in name]
    assert lowest
    assert all(gradient.any() for gradient in lowest)
    assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@grid_and_packed
def test_copies_select_by_themselves(vlm, make_copy):
    model = vlm.make()
    inputs = make_inputs(vlm, [1, 2])
    unpruned = vlm.make()(**inputs).logits
    apply_patch_selection(model, "1:image:0.3", visual_tokens=6)
    copied = make_copy(model)  # Transformers adds hooks that pickle refuses when a call returns hidden states
    expected = model(**inputs).logits
    assert torch.equal(copied(**inputs).logits, expected)
    remove_patch_selection(copied)
    assert torch.equal(copied(**inputs).logits, unpruned)
    assert torch.equal(model(**inputs).logits, expected)


def test_selection_cannot_change_while_it_is_recorded():
    model, inputs = make_both("llava", [1])
    apply_patch_selection(model, "1:image:0.3", visual_tokens=5)
    with record_patch_selection(model) as recorded:
        with pytest.raises(RuntimeError):
            apply_patch_selection(model, "2:image:0.3")
        with pytest.raises(RuntimeError):
            remove_patch_selection(model)
        with record_patch_selection(model) as inner:
            model(**inputs)
        model(**inputs)
    assert len(inner) == 2
    assert len(recorded) == 4


@grid_and_packed
def test_decoding_by_hand(vlm):
    model = vlm.make()
    inputs = make_inputs(vlm, [1])
    model(**make_inputs(vlm, [2, 1]))  # an earlier call without selection
    apply_patch_selection(model, "1:image:0.5", visual_tokens=6)
    outputs = model.generate(
        **inputs,
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new_ids = outputs.sequences[:, -2:-1]
    cache = model(**inputs, use_cache=True)[CACHE_NAME]
    mask = nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    for name in {CACHE_NAME, "past_key_values"}:
        with pytest.raises(ValueError, match="attention_mask"):  # of the caller's prompt instead of the shorter one
            model(input_ids=new_ids, attention_mask=mask, **{name: cache})
    logits = model(input_ids=new_ids, **{CACHE_NAME: cache}).logits[:, -1]
    assert_close(logits, outputs.logits[1], atol=1e-5, rtol=0)


def test_lengths_count_the_prompt_of_the_caller():
    model, inputs = make_both("llava", [1])
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


def test_accelerate_dispatches_patched_models(tmp_path):
    model, inputs = make_both("llava", [1, 2])
    apply_patch_selection(model, "1:image:0.5", visual_tokens=5)
    expected = model(**inputs).logits
    accelerate.disk_offload(model, tmp_path)
    assert_close(model(**inputs).logits, expected)
    remove_patch_selection(model)
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_other_towers_do_not_select():
    model, inputs = make_both("llava_pixtral", [1])
    with pytest.raises(TypeError, match="tower"):
        apply_patch_selection(model, "1:image:0.5")
    with pytest.raises(TypeError):
        TextGuide.for_model(model)
    apply_patch_selection(model, "unpruned", visual_tokens=4)
    with record_patch_selection(model) as recorded:
        model(**inputs)
    assert recorded[0].kept_indices.shape == (1, 4)


def test_a_rate_is_of_the_image_and_not_of_what_the_tower_keeps():
    model, inputs = make_both("llava", [1])
    for keep_rate, number in ((0.25, 16), (0.75, 32)):  # the tower keeps 32 of 64
        apply_patch_selection(model, "1:image:0.5", keep_rate=keep_rate)
        with record_patch_selection(model) as recorded:
            model(**inputs)
        assert recorded[-1].kept_indices.shape == (1, number)


def test_pooling_that_has_no_grid_is_refused_when_it_is_applied():
    model, inputs = make_both("llava", [1])
    with pytest.raises(ValueError, match="[Pp]ool"):  # the patches kept by the tower are no grid
        apply_patch_selection(model, "2:image:0.25", visual_tokens=4, scorer="pooling")
    with pytest.raises(ValueError, match="cells"):  # 4 x 15 cells
        apply_patch_selection(model, visual_tokens=60, scorer="pooling")
    apply_patch_selection(model, visual_tokens=4, scorer="pooling")
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1] - 60


def test_a_part_of_a_patched_model_is_refused():
    model, inputs = make_both("llava", [1])
    apply_patch_selection(model, "2:image:0.5")
    expected = model(**inputs).logits
    for part in (model.model, model.model.vision_tower):
        with pytest.raises(ValueError, match="whole model"):
            remove_patch_selection(part)
        with pytest.raises(ValueError, match="whole model"):
            apply_patch_selection(part, "1:image:0.5")
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("schedule", ["unpruned", "2:image:0.5"])
def test_removal_reaches_the_selection_of_a_part(schedule):
    model, inputs = make_both("llava", [1])
    expected = model(**inputs).logits
    apply_patch_selection(model.model, schedule, visual_tokens=5)
    assert model.model(**inputs).last_hidden_state.shape[1] < expected.shape[1]
    remove_patch_selection(model)
    assert torch.equal(model(**inputs).logits, expected)


def test_the_pipeline_takes_chat_messages():
    model = BY_NAME["llava"].make()
    processor = make_llava_processor()
    processor.tokenizer.padding_side = "left"
    image = Image.new("RGB", (40, 30), "red")
    messages = [conversation(text, image) for text in ("what is it ?", "red ?")]
    apply_patch_selection(model, "1:image:0.5", visual_tokens=8)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"max_new_tokens": 4, "do_sample": False}
    results = pipe(messages, return_full_text=False, batch_size=2, generate_kwargs=options)
    for result, message in zip(results, messages):
        inputs = processor.apply_chat_template(
            message, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        (sequence,) = model.generate(**inputs, **options)
        answer = processor.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert result[0]["generated_text"].strip() == answer.strip() != ""


@torch.enable_grad()
def test_trainer_trains_and_evaluates(tmp_path):
    vlm = BY_NAME["llava"]
    model = vlm.make()
    rows = []
    for seed in range(4):
        row = {name: value[0] for name, value in make_inputs(vlm, [1], seed=seed).items()}
        row["labels"] = row["input_ids"].clone()
        row["labels"][:70] = -100
        rows.append(row)
    apply_patch_selection(model, "1:image:0.5", visual_tokens=8)
    arguments = TrainingArguments(
        tmp_path,
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        prediction_loss_only=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    trainer.save_model(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved").eval()
    remove_patch_selection(model)
    inputs = make_inputs(vlm)
    assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)


def test_guides_move_to_the_device_of_the_model():
    guide = TextGuide(32, 4, 8)
    apply_patch_selection(BY_NAME["llava"].make().to("meta"), "1:text:0.3", guide=guide)
    assert guide.query.weight.device.type == "meta"
