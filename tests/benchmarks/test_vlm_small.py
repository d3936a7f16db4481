"""The small LLaVA on busy scenes: resuming, compared methods and costs."""

import shutil

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

from modeling_trips.hosts import TextGuide, apply_patch_selection, remove_patch_selection
from modeling_trips.hosts.vlm.supervision import guided_selection
from modeling_trips.patch_selection import selection_loss


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
    options = [
        "--per_device_train_batch_size=2",
        "--warmup_steps=1",
        "--save_steps=1",
        "--bf16=False",
        "--max_steps=2",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main([f"--output_dir={whole}", *options])
    shutil.copytree(whole / "checkpoint-1", parts / "checkpoint-1")
    train.main([f"--output_dir={parts}", *options, "--resume_from_checkpoint=last"])
    resumed = load_file(parts / "model.safetensors")
    assert not any("patch." in name for name in resumed)  # those of the training
    for name, expected in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(resumed[name], expected)


def loss_of(model, guide: TextGuide) -> float:
    """Return the loss of new questions about colors, which have equal lengths, by the patched model."""
    pixel_values, rows = guides.draw_questions(1, 0, 4, 12)
    asked = [(image, question) for image, row in enumerate(rows) for question in row if question.kind == "color"]
    prompt = torch.tensor([small_model.encode(question.text) for _, question in asked])
    apply_patch_selection(model, "2:text:0.11", guide=guide)
    selection = guided_selection(model, llava_inputs(pixel_values[[image for image, _ in asked]], prompt))
    remove_patch_selection(model)
    targets = train.targets_of(question.region for _, question in asked)
    return selection_loss(selection.scores, selection.candidate_indices, targets).mean().item()


@pytest.mark.parametrize("teacher", ["regions", "attention", "answers"])
def test_guides_are_trained_on_the_frozen_model(model, teacher):
    before = [parameter.clone() for parameter in model.parameters()]
    guide = guides.train_guide(model, 2, teacher, seed=0, steps=20 if teacher == "regions" else 2, num_images=4)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters()))
    torch.manual_seed(0)
    untrained = TextGuide.for_model(model)
    assert not torch.equal(guide.query.weight, untrained.query.weight)
    if teacher == "regions":
        assert loss_of(model, guide) < 0.995 * loss_of(model, untrained)
