"""The small LLaVA on busy scenes: resuming, compared methods and costs."""

import guides
import pytest
import small_model
import torch
import train
from contestants import (
    Contestant,
    costs,
    llava_inputs,
    low_resolution_features,
    next_token,
    prefill,
    set_contestant,
)
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from modeling_trips.hosts import TextGuide


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return small_model.make_model(0).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def questions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(2, 3, 96, 96, generator=generator)
    return pixel_values, torch.randint(4, len(small_model.WORDS), (2, 6), generator=generator)


def test_contestants_that_keep_all_tokens_match_the_model(model, questions):
    expected = model(**llava_inputs(*questions)).logits[:, -1]
    features = torch.stack([*model.model.get_image_features(questions[0]).pooler_output])
    torch.testing.assert_close(prefill(model, features, questions[1])[0], expected)
    torch.testing.assert_close(prefill(model, features, questions[1], 144)[0], expected)
    torch.testing.assert_close(low_resolution_features(model, 12, questions[0]), features)


def test_fastv_shortens_the_later_layers(model, questions):
    features = torch.stack([*model.model.get_image_features(questions[0]).pooler_output])
    _, cache = prefill(model, features, questions[1], 16)
    assert [layer.keys.shape[2] for layer in cache.layers] == [151, 151, 23, 23]


@pytest.mark.parametrize(
    "contestant",
    [
        Contestant("unpruned"),
        Contestant("tower", 16, layer=2, guidance="image"),
        Contestant("guide", 9, layer=2, guidance="text"),
        Contestant("pixels", 36, side=6),
    ],
    ids=lambda contestant: contestant.name,
)
def test_costs_of_the_tower_are_counted(model, questions, contestant):
    """PyTorch's count of matrix products agrees; selection itself is below one percent."""
    model.set_attn_implementation("eager")
    set_contestant(model, contestant, {"text": TextGuide.for_model(model)})
    with FlopCounterMode(display=False) as counter:
        next_token(model, contestant, *questions)
    set_contestant(model, Contestant("unpruned"), {})
    model.set_attn_implementation("sdpa")
    counted = counter.get_total_flops() / 2 / len(questions[0]) / 1e6
    expected = costs(model.config, contestant, 6)
    length = 7 + contestant.kept
    # Eager attention also computes the upper half of the map.
    upper_half = 4 * length * (length - 1) * 128 / 1e6
    assert counted == pytest.approx(expected["tower_mmacs"] + expected["prefill_mmacs"] + upper_half, rel=0.01)
    assert expected["kv_bytes"] == 2 * 4 * 4 * 128 * length


def test_training_resumes(tmp_path):
    options = ["--batch_size", "2", "--warmup_steps", "1", "--save_steps", "1", "--bf16", "False"]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    train.main(["--output_dir", whole, "--max_steps", "2", *options])
    checkpoint = tmp_path / "whole" / "checkpoint.pt"
    step = train.make_batch
    train.make_batch = lambda args, number: step(args, number) if number < 1 else exec("raise KeyboardInterrupt")
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main(["--output_dir", parts, "--max_steps", "2", *options])
    finally:
        train.make_batch = step
    train.main(["--output_dir", parts, "--max_steps", "2", *options])
    assert checkpoint.exists()
    resumed = load_file(f"{parts}/model.safetensors")
    for name, expected in load_file(f"{whole}/model.safetensors").items():
        torch.testing.assert_close(resumed[name], expected)


@pytest.mark.parametrize("teacher", ["regions", "attention", "answers"])
def test_guides_are_trained_on_the_frozen_model(model, teacher):
    before = [parameter.clone() for parameter in model.parameters()]
    new = TextGuide.for_model(model)
    guide = guides.train_guide(model, 2, teacher, steps=2, num_images=2)
    assert guide.query.weight.shape == new.query.weight.shape
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters()))
